"""Directories of results, written in a line and compared by what they hold."""

from sinkprune_plugin.outputs import new_directory


def content(directory):
    return {
        str(file.relative_to(directory)): file.read_text() for file in sorted(directory.rglob("*")) if file.is_file()
    }


def write(target, overwrite=False, **files):
    with new_directory(target, overwrite=overwrite) as directory:
        for name, text in files.items():
            (directory / name).write_text(text)
