"""Options, presets, and how they become one typed configuration."""
