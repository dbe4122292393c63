"""The zoomable pattern: tiles of an attention map of any length, drawn where they are asked for."""
