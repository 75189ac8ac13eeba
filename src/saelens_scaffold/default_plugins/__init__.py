"""The plugins that come with the package, a file each, imported when they are chosen."""
