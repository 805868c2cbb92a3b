"""Docstrings are written for Sphinx' eyes; here they become Markdown.

Roles and directives: ``:math:`` and ``.. math::`` become formulas, ``:func:`name``` a
link. ``Example:`` is Google's ``Examples:``, and what follows a ``#`` in the
description of an array, its shape and dtype, is no heading.
"""

import re
import textwrap

import griffe

MODULES = ("optax_flash", "optax_flash.flax", "optax_flash.plan", "optax_flash.release")
BLOCK = re.compile(r"^( *)\.\. math::(.*)\n((?:\1 +.*\n|\n)*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]*)`")
ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):`~?([\w.]+)`")
HEADING = re.compile(r"^( *)Example:$", re.MULTILINE)
SHAPE = re.compile(
    r"(?<!\S)# ((?:shape=)?\([^)]*\)(?:, (?:dtype=)?\w+\d+)?|u?int\d+|float\d+)"
)
REMARK = re.compile(r"^((?! *(?:>>>|\.\.\.)).*?)(?<!\S)# ", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg, **kwargs):
        del kwargs
        public = {}
        for module in MODULES:
            for name, member in pkg.modules_collection[module].members.items():
                if member.is_alias:
                    public.setdefault(name, f"{module}.{name}")
        for obj in _objects(pkg):
            if obj.docstring:
                obj.docstring.value = _markdown(obj.docstring.value, public)


def _objects(obj):
    yield obj
    for member in obj.members.values():
        if not member.is_alias:
            yield from _objects(member)


def _markdown(text, public):
    text = BLOCK.sub(_formula, text + "\n").rstrip()
    text = INLINE.sub(r"$\1$", text)
    text = ROLE.sub(lambda role: _link(role[1], public), text)
    text = HEADING.sub(r"\1Examples:", text)
    text = SHAPE.sub(r"`\1`", text)
    return REMARK.sub(r"\1– ", text)


def _formula(block):
    indent, first, rest = block.groups()
    latex = textwrap.dedent(first.strip() + "\n" + rest if first else rest).strip()
    return textwrap.indent(f"\n$$\n{latex}\n$$\n\n", indent)


def _link(name, public):
    short = name.removeprefix("optax_flash.")
    return f"[`{short}`][{public[short]}]" if short in public else f"`{name}`"
