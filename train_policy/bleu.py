"""BLEU of `multi30k_translation` (Papineni et al. 2002): greedy translations of the held-out captions, counted by sacrebleu."""

from collections.abc import Sequence

from mango_env.workloads.multi30k import Translation


def bleu(workload: Translation, limit: int | None = None) -> float:
    """Corpus BLEU in [0, 100] on the first `limit` held-out captions (None: all), words in lower case, signs apart.

    References keep words that are not in the model's vocabulary; it can never say those.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    return score(workload.translate(limit), workload.references(limit))


def score(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of sentences beside one reference each."""
    try:
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise ImportError('BLEU is counted by sacrebleu: pip install "mango-optim[metrics]"') from error
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} translations beside {len(references)} references")
    # Words are split already and full stops stand apart: `force` keeps the library from warning about just that.
    return float(corpus_bleu(list(hypotheses), [list(references)], force=True).score)
