"""State-space layers, and transformers turned into them."""
