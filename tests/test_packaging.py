import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import polarcache.client
from polarcache.proto import errors

ROOT = Path(__file__).parent.parent


def test_package_list_matches_the_tree() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = {
        "polarcache." + ".".join(init.parent.relative_to(ROOT).parts)
        for folder in config["package-dir"].values()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(config["packages"]) == on_disk


def test_exports_are_exact() -> None:
    assert len(set(polarcache.client.__all__)) == len(polarcache.client.__all__)
    for name in polarcache.client.__all__:
        assert getattr(polarcache.client, name)
    public = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert set(errors.__all__) == public


@pytest.mark.parametrize("module", ["polarcache.client", "polarcache.cli.client"])
def test_a_client_needs_no_torch(module: str) -> None:
    program = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'redis', 'msgpack', 'triton', 'pydantic'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"import {module}\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


def test_source_files_stay_small() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for folder in config["package-dir"].values():
        for path in (ROOT / folder).rglob("*.py"):
            if "_pb2" not in path.name:
                assert len(path.read_text().splitlines()) <= 400, path


def test_the_readme_s_configuration_table_is_up_to_date() -> None:
    script = ROOT / "scripts" / "configuration_table.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


def test_links_of_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("d*/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document}: {target}"
