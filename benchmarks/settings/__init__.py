"""The published settings that the twin's policies are compared in."""
