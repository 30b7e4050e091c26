"""`python -m polarcache.cli`, the same as `polarcache`."""

from polarcache.cli.main import main

if __name__ == "__main__":
    main(prog_name="polarcache")
