"""The command lines: flags, runs in folders, and a module for each command."""
