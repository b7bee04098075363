"""The trained model of a ``longnet train`` folder as a model of transformers."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from longnet.hf.language import LongNetForCausalLM


def from_run(folder: str | Path) -> PreTrainedModel:
    """The trained model of a run folder, on the CPU and in evaluation mode.

    A run that began with a transformer of Hugging Face gives that transformer under :func:`longnet.hf.apply`. Its
    ``save_pretrained`` writes a folder that :func:`longnet.hf.load` reads; :func:`longnet.hf.restore` takes the pattern away.
    A run of a LongNet gives :meth:`LongNetForCausalLM.from_run`. ``AutoTokenizer.from_pretrained(folder)`` reads the run's
    tokenizer; ``eos_token_id`` is the token that ends a document.

    Needs what training needs, the extra ``train``.

    Raises:
        ValueError: no run there, no model in it yet, or a damaged one.
    """
    from longnet.training.folder import RunFolder, load_trained
    from longnet.training.transformer import TransformerLM

    trained = load_trained(folder)
    if not isinstance(trained, TransformerLM):
        return LongNetForCausalLM.from_run(folder)
    model: PreTrainedModel = trained.model
    end = RunFolder(folder).tokenizer.end
    if end is not None:
        model.config.eos_token_id = end
        if model.generation_config is not None:
            model.generation_config.eos_token_id = end
    return model
