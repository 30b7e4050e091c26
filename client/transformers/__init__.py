"""Stored prefixes for Hugging Face transformers.

    spec = namespace_spec(model)
    namespace = client.open_namespace(spec)
    with StoredPrefixCache.from_store(client, namespace, model, token_ids, store_prompt=True) as c:
        output = model.generate(token_ids, past_key_values=c)

`RemotePrefixCache` has the same interface and leaves the prefix in the service. Importing this
package makes `attn_implementation="polarcache"` known, which it needs.
"""

from polarcache.client.transformers._attention import ATTENTION, register_attention
from polarcache.client.transformers._namespace import kv_layout, namespace_spec, weights_digest
from polarcache.client.transformers._prefix_cache import OnFailure, PrefixCache
from polarcache.client.transformers._remote_cache import RemotePrefixCache
from polarcache.client.transformers._stored_cache import StoredPrefixCache

__all__ = [
    "ATTENTION",
    "OnFailure",
    "PrefixCache",
    "RemotePrefixCache",
    "StoredPrefixCache",
    "kv_layout",
    "namespace_spec",
    "weights_digest",
]

# On import, so that `from_pretrained(..., attn_implementation="polarcache")` works at once.
register_attention()
