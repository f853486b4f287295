"""Compression: functions that map a model, or choices about one, to smaller ones; here the search for subnets in a budget."""
