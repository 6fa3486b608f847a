"""generate, evaluate: a trained model at work."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.verbs import options


@options.spread
def generate(
    run: options.RunName,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="Beginning of a text; may be repeated.", show_default=False),
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            "--prompts-file", metavar="FILE", help="One prompt a line; - reads standard input.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", help="Longest continuation.")] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="T", help="Below 1 safer, above 1 wilder.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option("--top-k", metavar="K", help="Only the K likeliest tokens.", show_default="all")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", metavar="P", help="Only the likeliest tokens with probability P in all.", show_default="all"
        ),
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", metavar="R", help="Above 1 repeats less.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop",
            metavar="TEXT",
            help="End before this text (\\n is a line break); may be repeated.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the drawing.")] = 42,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")] = False,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="A session; the default on a terminal without a prompt.")
    ] = False,
    *,
    weights: options.WeightsOptions,
    json: options.Json = False,
) -> int:
    """Write text with a trained model.

    [bold]Examples[/bold]

      orchestrate generate first-run --prompt "ROMEO:"
      orchestrate generate first-run --prompt "def " --greedy --stop "."
      orchestrate generate first-run                 (a session, /help inside)
      orchestrate generate first-run --prompts-file prompts.txt --json
    """
    from orchestrator.writing import Wish, write_texts

    wish = Wish(
        run=run,
        runs_dir=weights.runs_dir.absolute(),
        prompts=tuple(prompt) if prompt else None,
        prompts_file=prompts_file,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=tuple(text.replace("\\n", "\n").replace("\\t", "\t") for text in stop or ()),
        seed=seed,
        greedy=greedy,
        interactive=interactive,
        checkpoint=weights.checkpoint,
        device=weights.device or "auto",
        json=json,
    )
    return write_texts(wish)


@options.spread
def evaluate(
    run: options.RunName,
    data: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="Text to score: as --data of train.", show_default="its validation text"),
    ] = None,
    text_field: options.TextField = None,
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            metavar="fp32|fp16|bf16|int8|int4",
            help="What to score it in.",
            show_default="the run's",
        ),
    ] = None,
    *,
    weights: options.WeightsOptions,
    json: options.Json = False,
) -> int:
    """Score a trained model on text: loss, perplexity, bits per byte, accuracy.

    [bold]Examples[/bold]

      orchestrate evaluate first-run                 (on the held-out text)
      orchestrate evaluate first-run other.txt --json
    """
    from orchestrator.scoring import score_run

    return score_run(
        run=run,
        data=data,
        text_field=text_field,
        precision=precision,
        checkpoint=weights.checkpoint,
        device=weights.device or "auto",
        runs_dir=weights.runs_dir.absolute(),
        json=json,
    )
