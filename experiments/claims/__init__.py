"""Executable claims: what a paper says, measured at our size. One file per system, beside the harness."""
