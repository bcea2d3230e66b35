"""The audit: every memory and control, under every edit, asked by prompt and by trigger, and judged."""
