#!/bin/sh
# vLLM's OpenAI server on this machine's CPU, with a PolarCache store: serve.sh PORT [vLLM flags]
# MODEL, PROFILE and POLARCACHE_ENDPOINT may be set.
set -eu
port=$1
shift
model=${MODEL:-$(cd "$(dirname "$0")/../tiny_lm" && pwd)}
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
# The checkout's folders must not shadow packages of the same names.
export PYTHONSAFEPATH=1

exec python -m vllm.entrypoints.openai.api_server \
    --model "$model" --served-model-name tiny --host 127.0.0.1 --port "$port" \
    --enable-prompt-tokens-details --enforce-eager \
    --kv-transfer-config '{
        "kv_connector": "PolarCacheConnector",
        "kv_connector_module_path": "polarcache.client.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "polarcache.endpoint": "'"${POLARCACHE_ENDPOINT:-grpc://127.0.0.1:50061}"'",
            "polarcache.profile": "'"${PROFILE:-exact}"'"
        }
    }' "$@"
