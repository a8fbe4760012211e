"""`deeplab-jax calibrate`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from deeplab_jax.cli import options, outputs
from deeplab_jax.utils.errors import UserError, listed, print_warning


@options.view_options
def calibrate(
    settings: dict[str, Any],
    checkpoint: options.Checkpoint,
    data: options.Data = "",
    root: options.Root = "",
    split: options.Split = "",
    limit: options.Limit = 0,
    risk: Annotated[
        float, typer.Option(help="Expected share of pixels that are wrong and not unsure.")
    ] = 0.05,
    of: Annotated[
        str,
        typer.Option(
            help="Class (name or id): --risk is then the expected share of its pixels that are "
            "predicted as another class and not unsure."
        ),
    ] = "",
    out: Annotated[
        str,
        options.output_option(
            "File to write (.json). Default: calibration.json in the checkpoint's folder.", ".json"
        ),
    ] = "",
    plot: Annotated[
        str, options.figure_option("Draw reliability before and after, and risk and coverage, here")
    ] = "",
    json_file: options.Json = "",
) -> None:
    """Fit a model's probabilities to how often it is right, and find where it is unsure.

    Half of the split's images fit temperatures, which divide the logits and change no class. The
    other half measures the calibration before and after, and sets the rule for unsure pixels at the
    stated risk. `predict --unsure` and `evaluate --unsure` use it. Take images on which the model
    was not trained. Scales, mirrored images and windows are those of `predict`.

    Examples:
      deeplab-jax calibrate runs/voc --risk 0.05 --plot reliability.png
      deeplab-jax calibrate runs/cracks --of crack --risk 0.1
      deeplab-jax calibrate model.tflite --data voc --root /data/voc --out model.calibration.json
    """
    from deeplab_jax.buckets.outputs import local_output
    from deeplab_jax.data.labels import class_id
    from deeplab_jax.evaluation import calibration, setup
    from deeplab_jax.inference.segmenter import load
    from deeplab_jax.utils.paths import CALIBRATION, is_bucket, user_cache
    from deeplab_jax.visualization import plots
    from deeplab_jax.weights import hub

    if not 0 < risk < 1:
        raise UserError(f"--risk must be above 0 and below 1, got {risk:g}: 0.05 is 5 %")
    given = checkpoint
    if is_bucket(checkpoint):
        checkpoint = str(hub.find_weights(checkpoint))
    config, dataset = setup.load_data(data, checkpoint, root=root, split=split, limit=limit)
    segmenter = load(checkpoint, **settings)
    if not out:
        is_cached = segmenter.path.absolute().is_relative_to(user_cache().absolute())
        if is_cached or not segmenter.path.is_dir():
            raise UserError(
                f"{given} is no checkpoint's folder on this machine, in which the calibration "
                "could be kept: give --out FILE.json, and later predict --calibration FILE.json"
            )
        out = str(segmenter.path / CALIBRATION)
        outputs.check("--out", out)
    warnings = setup.check_compatible(segmenter.labels, segmenter.architecture.in_channels, dataset)
    warnings += setup.training_warning(checkpoint, config)
    index = class_id(of, segmenter.labels, "--of: ") if of else None
    with outputs.progress_bar("calibrate", len(dataset.source)) as advance:
        done = calibration.calibrate(segmenter, dataset, risk=risk, of=index, progress=advance)
    found = done.calibration
    found.report.update(data=config.name, root=config.root, split=config.eval_split)
    with local_output(out) as (file, _):
        found.write(file)
    rule = found.report["rule"]
    if plot:
        tops = done.before.top[:, 0], done.after.top[:, 0]
        figure = plots.calibration_plot(*tops, done.curve.points(), rule, risk)
        outputs.save_figure(plot, figure)
    console = outputs.console(json_file)
    rows = [
        (title, *(f"{number:.5f}" for number in found.report[title].values()))
        for title in ("before", "after")
    ]
    console.print(outputs.table(("", "ECE", "SCE", "Brier score", "NLL"), rows), "")
    own = [
        f"{name} {value:.3f}"
        for name, value in zip(found.classes, found.temperatures, strict=True)
        if value != found.temperature
    ]
    facts = {
        "temperature": f"{found.temperature:.4f}",
        "of predicted classes": ", ".join(own) or "the same",
        "images": f"{found.report['images']}, of which {done.curve.num_images} set the rule",
        "unsure": f"{1 - rule['coverage']:.2%} of the pixels, {found.rule()}",
        "promise": found.promise(),
        "risk on these images": f"{rule['risk']:.2%}",
        "written to": out,
    }
    console.print(*outputs.facts(facts), sep="\n")
    outputs.write_json(json_file, dataclasses.asdict(found) | {"points": done.curve.points()})
    if absent := found.report["absent"]:
        warnings.append(f"in no label of these images: {listed(absent)}")
    if rule["coverage"] < 0.5:
        warnings.append("more than half of the pixels are unsure: a higher --risk leaves fewer")
    for warning in warnings:
        print_warning(warning)
