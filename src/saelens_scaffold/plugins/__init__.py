"""Hooks into training and evaluation, and the plugins that come with the package.

A plugin is imported when an SAE's configuration chooses it.
"""
