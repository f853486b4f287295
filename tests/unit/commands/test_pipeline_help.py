"""The help of ``sslim compress pipeline`` names every method, and the file that it shows can be read."""

import re

from sslim.commands import compress_pipeline
from sslim.recipes.pipeline import ALL, read_pipeline


def test_the_help_names_every_method_and_shows_a_file_that_can_be_read(tmp_path):
    text = compress_pipeline.Options.__doc__
    sentence = " ".join(text.split("`sslim compress METHOD")[0].split())
    assert all(re.search(rf"[ :]{method}[,.]", sentence) for method in ALL)
    lines = re.findall(r"^ *\| ?(.*)$", text, flags=re.MULTILINE)
    path = tmp_path / "small.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    pipeline = read_pipeline(path)
    assert [step.method for step in pipeline.steps] == ["heads", "rows", "iterative-weights", "quantize"]
    assert [step.rounds for step in pipeline.steps] == [2, 1, 1, 1]
    assert [step.recover is None for step in pipeline.steps] == [False, False, True, True]
