"""What docs/evidence.md says beside its numbers."""

from __future__ import annotations

INTRODUCTION = """
A controlled experiment on the demo's tiny model and drawn scenes, where the truth is known by construction. Tuning
data are answered from habit, without looking, in none, a quarter, a half or three quarters of their colours and
captions; models are tuned on all answer tokens, on those that VIG selects, and on what else one might select; and then
asked about pictures where habit is always wrong. It is a miniature: it says how selection behaves, not what your model
will gain.
"""
MADE_OF = """
`{command}`: {count} of {planned} lines (two of them the bases before tuning), {machine}, torch {torch}, transformers
{transformers}; commit {commit}, {date}. They are `benchmarks/results/evidence.jsonl`; `python -m benchmarks evidence
--check shipped/0.75/1100/vig` runs one of them again and compares.
"""
TESTS = """
Points, mean ± half of the 95 % interval of a paired t over seeds; in brackets the 95 % interval of a bootstrap over
seeds and pictures; p by Holm within the table. Bold: p < 0.05.
"""
LOSES = """
Beside these, what was not tested, of which intervals alone are told. Less is better of the text-only loss and of
CHAIR_s.
"""
ARMS = """
Means over seeds ± half of the 95 % interval. Per cent, unless the head says otherwise; tokens of all steps; processor
seconds of a training with stored features, where every arm has the same number of samples to run through the model.
"""
VARIANTS = """
On the first five seeds, minus VIG with both levels and the blurred null:
"""
HABIT = """
It gives the usual colour to {own} % of the anti-prior questions{other}: what is wrong there is a habit of the language
model, not a label that it was never tempted by. It scored its own data. `benchmarks/evidence/make_habit_base.py` made
it.
"""
DESIGN = (
    """Data: {samples} drawn samples, a fifth of them without a picture. A share of the colours and captions is
    answered from habit: the usual colour, the usual company. A seed changes the data, the order of training and the
    random choices together.""",
    """Scores: the project's `Scorer`, blur at 0.1 of the side as null. Masks: `vig.select` at p = {p} with its
    defaults, so that end-of-turn tokens of kept samples are kept. Text-only samples are kept whole by every arm.""",
    """Training: the recipe of `vig train`, {steps} steps of {batch} samples, learning rate {rate} for every arm, the
    tower frozen (its features are stored). Every arm takes as many steps, and samples a step, as the others: one that
    keeps fewer tokens learns from fewer.""",
    """Exams, the same for all runs: {test} questions for a colour where nothing has its usual one, {prior} where
    everything has, {captions} greedy captions, all 32 questions without a picture. The learning rate was looked at on
    {validation} other questions.""",
    """Arms. VIG: samples and, in them, tokens at or above the threshold. VIG and easy tokens: these, and in every
    sample the tokens whose null loss is below {nats} nats. Random: `vig select --level random`. Loss filter: as many
    samples as VIG keeps, those of the lowest mean loss with the picture, whole. Permuted: the token values of each
    sample in random order, then as VIG. Oracle: every sample that was not answered from habit, whole. Content words:
    colours, objects, numbers and the end of the turn, in every sample.""",
    """Analysis: `benchmarks/evidence/analysis.py`, committed before the first run, with seeds that nobody had used. A
    pilot of 208 runs had explored some 40 contrasts with other seeds; none of its lines is used here. Its VIG arm did
    not keep end-of-turn tokens.""",
    """Limits: one model of a million parameters, drawn scenes, one kind of wrong answer whose share is known. The
    shipped base hardly answers by habit, so that its blind answers are wrong labels more than temptation. Nothing here
    is a figure of the paper, nor a reproduction of one.""",
)
