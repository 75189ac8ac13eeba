"""Trainer hooks: their specifications, the manager, and the plugins of the package.

A plugin is imported when an SAE's configuration chooses it.
"""
