"""The command line: `polarcache`."""
