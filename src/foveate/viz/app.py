"""An app in the browser: choose image, question, methods and budgets, and see what comes of them."""

from __future__ import annotations

import html
import socket
from collections.abc import Callable, Sequence
from typing import Any

from foveate.core.errors import FoveateError, InputError
from foveate.core.reducer import Method
from foveate.families import family_of
from foveate.measure.job import prepare
from foveate.measure.loading import open_image
from foveate.registry import by_default, list_methods
from foveate.viz.comparison import compare, reducers
from foveate.viz.page import page

try:
    import gradio as gr
except ImportError as error:
    raise FoveateError('the app needs gradio: pip install "foveate[app]"') from error

_INTRO = "# foveate\nWhich visual tokens do methods keep, what does the model answer from them, and what does it cost?"
_EMPTY = "<p>Answers, overlays and costs appear here.</p>"
# The page brings its own style, so it lives in a frame, which grows with what is in it.
_FRAME = (
    '<iframe title="Comparison" srcdoc="{}" style="width: 100%; height: 900px; border: 0" '
    'onload="const f = this, d = f.contentDocument; new ResizeObserver(() => '
    "{{ f.style.height = d.documentElement.offsetHeight + 8 + 'px'; }}).observe(d.body)\"></iframe>"
)


def build(
    model: Any,
    processor: Any,
    name: str,
    make: Callable[[str, str], Method],
    image: str | None = None,
    question: str | None = None,
    methods: Sequence[str] = (),
    budgets: Sequence[str] = (),
    template: str | None = None,
    max_new_tokens: int = 32,
    repeats: int = 3,
    rectify: float = 0.0,
    absorb: bool = False,
) -> gr.Blocks:
    """Build the app around a loaded model. It sends nothing anywhere.

    Parameters
    ----------
    model, processor, name
        The model, from `foveate.measure.loading.load_model`, and what to call it.
    make
        Builds a reducer from a method's name or file and a budget; both are text.
    image, question, methods, budgets
        What the form holds at first.
    template, max_new_tokens
        See `foveate.measure.job.prepare`.
    repeats
        Measured runs per arm.
    rectify, absorb
        See `foveate.engines.settings.Settings`.

    Raises
    ------
    FoveateError
        If gradio is not installed.
    """

    def run(path: str | None, asked: str, chosen: list[str], keeps: str, progress: Any = gr.Progress()) -> str:  # noqa: B008
        try:
            if path is None:
                raise InputError("there is no image yet: upload one")
            budgets = [part for part in keeps.replace(";", " ").split() if part]
            made = reducers(chosen, budgets, make)
            picture = open_image(path)
            job = prepare(model, processor, picture, asked, template, max_new_tokens)
            comparison = compare(
                job, picture, asked, name, made, budgets, repeats, lambda line: progress(None, desc=line), rectify,
                absorb,
            )  # fmt: skip
        except FoveateError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return _FRAME.format(html.escape(page(comparison)))

    with gr.Blocks(title="foveate", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(f"{_INTRO} The model is `{name}`.")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                shown = gr.Image(image, type="filepath", label="Image", sources=["upload", "clipboard"], height=260)
            with gr.Column(scale=2, min_width=320):
                asked = gr.Textbox(question or "", label="Question", submit_btn=False)
                known = [*dict.fromkeys([*_usable(model), *methods])]
                chosen = gr.Dropdown(known, value=list(methods), multiselect=True, label="Methods")
                keeps = gr.Textbox(
                    " ".join(budgets), label="Budgets",
                    info="With spaces between them: tokens (64), shares (0.25), or adaptive (coverage:0.9)",
                )  # fmt: skip
                button = gr.Button("Compare", variant="primary")
        result = gr.HTML(_EMPTY, elem_id="result", padding=False)
        fields = [shown, asked, chosen, keeps]
        gr.on([button.click, asked.submit, keeps.submit], run, fields, result, concurrency_limit=1, api_name="compare")
    return blocks


def serve(blocks: gr.Blocks, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve the app until it is interrupted, at one address of this machine and nowhere else.

    Parameters
    ----------
    port
        0 takes a free one.
    say
        Gets the address once the app answers.

    Raises
    ------
    InputError
        If the address cannot be listened on.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            port = probe.getsockname()[1]
    except OSError as error:
        raise InputError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another --port"
        ) from error
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the network
    _, address, _ = blocks.queue().launch(
        server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, ssr_mode=False,
        inbrowser=False, enable_monitoring=False, footer_links=[], run_history=False,
        theme=gr.themes.Default(**fonts), show_error=True,
    )  # fmt: skip
    say(address)
    blocks.block_thread()


def _usable(model: Any) -> list[str]:
    """Return the methods that run on a model without further parameters."""
    family = family_of(model)
    return [
        method for method in list_methods()
        if isinstance(made := by_default(method), Method) and family.lacks(made) is None and not made.guided
    ]  # fmt: skip
