"""The verbs of the command line: one file each, with `Options` (what tyro reads) and `main`. Nothing heavy at module level."""
