"""The sharding tools: `python -m data_tools COMMAND`."""
