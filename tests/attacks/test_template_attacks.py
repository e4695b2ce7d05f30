"""Hostile chat templates: no execution, no files, bounded time, memory and output, one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from haomiao.errors import TemplateError
from haomiao.text.template import ChatTemplate
from haomiao.text.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "x"}]

ATTACKS = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "attr": "{{ (''|attr('__class__')).mro() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "map": "{{ ['x']|map(attribute='__class__.__mro__')|list }}",
    "namespace": "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "mutate": "{{ messages.append(1) }}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "range": "{{ range(10**9)|list }}",
    "multiply": "{{ 'a' * 10000000000 }}",
    "power": "{{ (9**9999)**9999 }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "center": "{{ 'a'|center(1000000000) }}",
    "doubling": "{% set ns = namespace(x='ab') %}{% for i in range(64) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "lists": "{% set ns = namespace(x=[1]) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "fold": "{{ 'a' * 99999999 * 99999 }}",
    "nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "blocks": "{% if 1 %}" * 2000,
    "syntax": "{% for %}",
    "undefined": "{{ a.b.c }}",
    "surrogate": "{{ '\\ud800' }}",
    "division": "{{ 1 // 0 }}",
    "refused": "{{ raise_exception('no\nway') }}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_is_stopped_with_one_line(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(ATTACKS[name].replace("MARK", str(mark))).render(HELLO)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 800
    assert not mark.exists()
    assert ChatTemplate(None).render(HELLO).startswith("<|im_start|>user")  # the next one is not harmed


def test_source_size_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="larger"):
        ChatTemplate("x" * (2 << 20))


def test_a_hostile_template_in_a_checkpoint_is_an_error_line_when_used(tiny_tokenizer: Path) -> None:
    (tiny_tokenizer / "chat_template.jinja").write_text(ATTACKS["classes"])
    with pytest.raises(TemplateError):
        ChatTemplate.of(Tokenizer(tiny_tokenizer)).render(HELLO)


@pytest.fixture
def tiny_tokenizer(tmp_path: Path) -> Path:
    """The smallest tokenizer.json there is."""
    (tmp_path / "tokenizer.json").write_text(
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": []}'
    )
    return tmp_path
