"""The artifact: manifest, codec (digits <-> bytes), writer, reader, verification. docs/format.md specifies it.

Import from the modules: `reader.open_artifact`, `writer.ArtifactWriter`, `groups.GroupTensors`, `codec`.
"""
