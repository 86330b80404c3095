"""Guidance: two looks at one prompt, combined into the logits that are decoded."""
