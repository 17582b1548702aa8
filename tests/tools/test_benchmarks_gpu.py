"""The benchmark for a GPU runs on a CPU too, and writes its part of the page."""

import sys

import gpu


def test_a_quick_run_writes_its_part_of_the_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / 'page.md'
    page.write_text('Before.\n<!-- gpu -->\nold\n<!-- /gpu -->\nAfter.\n')
    monkeypatch.setattr(sys, 'argv', ['gpu.py', '--quick', '--device', 'cpu', '--page', str(page)])
    gpu.main()
    text = page.read_text()
    assert text.startswith('Before.\n<!-- gpu -->\n## CPU') and text.endswith('<!-- /gpu -->\nAfter.\n')
    rows = {line.split('|')[1].strip(): line.split('|')[2].strip() for line in text.splitlines() if line[:1] == '|'}
    assert rows['dpsgd'].endswith('x') and rows['hybrid'].endswith('x')
    assert 0 < float(rows['float32']) < 1e-4 and 0 < float(rows['bfloat16']) < 0.5
