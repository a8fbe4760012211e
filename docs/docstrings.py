"""How the site reads docstrings."""

import re

import griffe


class Docstrings(griffe.Extension):
    """Shows examples as code, and comments as the descriptions of a config's fields."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            # Two names of one description: what follows a space would be the type of the first.
            names = re.compile(r"^ +\w+(, [\w.]+)+: ", re.M)
            obj.docstring.value = names.sub(lambda row: row[0].replace(", ", ",\u00a0"), text)

    def on_class(self, *, cls, **kwargs):
        if not (cls.module.path == "deeplab_jax.config.schema" or cls.name == "Architecture"):
            return
        text, lines = "", cls.lines_collection[cls.filepath]
        cls.docstring.value += "\n\nArgs:"
        fields = (each for each in cls.attributes.values() if "property" not in each.labels)
        for field in fields:
            start = field.lineno - 1
            while lines[start - 1].lstrip().startswith("#"):
                start -= 1
            comments = [line.partition("#")[2].strip() for line in lines[start : field.endlineno]]
            section = cls.module.members.get(str(field.annotation))
            # A comment may be that of two fields.
            text = " ".join(filter(None, comments)) or (
                section.docstring.value.partition("\n")[0] if section else text
            )
            cls.docstring.value += f"\n    {field.name}: {' '.join(text.split())}"
