"""The programs: each is run as `python -m experiments.<name>`, and each says `--help`."""
