"""Where experts live while a mixture trains: FSSDP (Hecate), expert parallelism, FSDP, replication."""
