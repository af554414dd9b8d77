"""One module per command of `python -m data_tools`: its arguments, and what it says; the work is done elsewhere."""
