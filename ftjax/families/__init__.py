"""Model families: one file each, with its config.json, tensor names and blocks."""
