"""Small parts trained beside a frozen model: low-rank terms, mixtures of them, and masks that prune."""
