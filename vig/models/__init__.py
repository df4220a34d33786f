"""Model families, prompts and answer masks, pixels and null images, the LM head."""
