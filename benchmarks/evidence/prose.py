"""What docs/evidence.md says beside its numbers."""

from __future__ import annotations

INTRODUCTION = """
A controlled experiment on the demo's tiny model and drawn scenes, where the truth is known by construction. A share of
the colour answers and captions in the tuning data (none, a quarter, a half, three quarters) was written from habit,
without looking at the picture: blind answers, wrong wherever the picture is unusual. The model is tuned on all answer
tokens, on those that VIG selects, or on what else one might select, and is then asked about pictures where habit is
always wrong. It is a miniature: it shows how selection behaves, not what your model will gain. No figure here is the
paper's.
"""
MADE_OF = """
`{command}`: {count} of {planned} lines (two of them the bases before tuning), {machine}, torch {torch}, transformers
{transformers}; commit {commit}, {date}. They are `benchmarks/results/evidence.jsonl`; `python -m benchmarks evidence
--check shipped/0.75/1100/vig` runs one of them again and compares.
"""
TESTS = """
Points: mean ± half of the 95 % interval of a paired t over seeds. In brackets the 95 % interval of a bootstrap over
seeds and pictures, which is too narrow where seeds are few: the t decides. p is adjusted by Holm within each table,
not across tables. Bold: adjusted p < 0.05.
"""
EASY = """
Described, not tested: what easy tokens change beside VIG alone, and the lowest and highest seed of whole answers.
"""
UNADJUSTED = """
Tests that show no difference by the adjusted p, though the interval by itself lies wholly on the worse side:
"""
UNTESTED = """
Described, not tested: measures whose interval, not adjusted, lies wholly on the worse side of all tokens:
"""
LOSES = """
Every measure that was described and not tested, with intervals that are not adjusted; the oracle stands there for
scale. Less is better of the text-only loss and of CHAIR_s.
"""
ARMS = """
Means over seeds ± half of the 95 % interval. Per cent, unless the head says otherwise. Tokens are those of all steps.
Text-only samples are kept whole by every arm, so that an arm that keeps fewer tokens trains on a larger share of them.
Seconds are processor time of one training on stored features. Every arm feeds as many samples and the machine had other
work at the same time: seconds do not tell arms apart.
"""
KEPT = """
What the arms keep of the samples with a picture. Wrong tokens are those that differ from the true answer:
"""
VARIANTS = """
On the first five seeds, minus VIG with both levels and the blurred null; described, not tested:
"""
PROBES = """
Described, not tested. `python -m benchmarks evidence --probes` trains {arms} at {share} blind answers
again, on {seeds} of the seeds, and asks each model, and the base before tuning, the questions of `vig probe`
([docs/probes.md](probes.md)). Answers are true, nothing has its usual colour but in the triples of match, and no run
was tuned or examined on these scenes. Base: figure and 95 % interval over pictures. Arms: mean over seeds, lowest and
highest in brackets. In misleading-text the statement before the question gives the same object a colour that is neither
its own nor its usual one; no tuning data hold such a statement. Even attention would put {even} % on image tokens.
"""
NO_PROBES = """
Not run: `python -m benchmarks evidence --probes` makes them.
"""
HABIT = """
`benchmarks/evidence/make_habit_base.py` tunes it from the demo's checkpoint with the vision tower frozen. Most colour
questions of that tuning are about pictures blurred beyond recognition, and are answered with the usual colour;
look-ups and captions are answered truly. Asked {asked} questions where no object has its usual colour, it writes the
usual colour in {habitual} % of its answers (the demo's checkpoint: {shipped_habitual} %), names the object right in
{named} %, and answers {looked_up} % of look-ups of the same objects right: it sees what it does not say. By this page's
exam, the colour word alone after the true words before it, {own} % are habitual{other}. It scored its own tuning data.
"""
HABIT_CAVEATS = (
    """VIG separates almost by construction here. The recipe was chosen while looking at VIG, and the null's blur, 0.1
    of the side, lies inside the range of blurs that this base learnt its habit on (0.05 to 0.25). VIG of its habitual
    colour words is {vig_habitual} nats, of the true ones {vig_true}. The base shows what VIG does where a habit comes
    from the text, not how often habits do.""",
    """A limit of VIG, found while the recipe was sought (exploratory). Where the habit was learnt on sharp pictures
    instead, with three quarters of the colour questions answered blindly, {sharp_canonical} % of the answers were
    habitual and VIG of the habitual words was {sharp_vig} nats: the model read the object off the picture, and the
    colour off the object. A habit that goes through the picture looks like sight to VIG.""",
    """The price of it: VIG of a colour that is the usual one and is right is about 0 on this base ({vig_usual} nats),
    so that VIG keeps hardly any of these words{right}.""",
)
# Figures of the habit base that are no run's. `python -m benchmarks.evidence.make_habit_base OUT --seed 0` prints the
# first seven before and after its tuning.
HABIT_FACTS = {
    "asked": "400",
    "habitual": "61.0",
    "shipped_habitual": "5.5",
    "named": "91.5",
    "looked_up": "96.0",
    "vig_habitual": "-0.28",
    "vig_true": "+4.98",
    # tune(model, processor, 0, Recipe(steps=150, blurred=0, blind=0.75)) of the same file, then examine
    "sharp_canonical": "78",
    "sharp_vig": "+3.9",
    # mean of _colour_vig of the true answers to 200 colour questions about scenes of prior 1.0 (88 % are within 0.05)
    "vig_usual": "-0.01",
}
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
    everything has, {captions} greedy captions, all 32 questions without a picture. Right colour is the colour word
    alone, after the true words before it; whole answer is every token, end of turn included. CHAIR_i: of the objects
    named in captions, those that are not there; CHAIR_s: captions that name one. The learning rate was looked at on
    {validation} other questions.""",
    """Arms. VIG: samples and, in them, tokens at or above the threshold. VIG and easy tokens: these, and in every
    sample the tokens whose null loss is below {nats} nats. Random: `vig select --level random`. Loss filter: as many
    samples as VIG keeps, those of the lowest mean loss with the picture, whole. Permuted: the token values of each
    sample in random order, then as VIG. Oracle: every sample that was not answered from habit, whole. Content words:
    colours, objects, numbers and the end of the turn, in every sample.""",
    """Analysis: `benchmarks/evidence/analysis.py`, committed before the first run, with seeds that nobody had used.
    The rules that turn its results into sentences are in `verdict.py` and `advice.py`; wording and the described parts
    were worked on while runs were going on, the tests were not.""",
    """Exploratory, and not used here: a pilot of 208 runs with other seeds, which looked at some 40 contrasts and
    suggested the primary one, and in which VIG did not keep end-of-turn tokens; and a first look at the base that
    answers by habit, on data of seed 77.""",
    """Limits: one model of a million parameters, drawn scenes, one kind of wrong answer whose share is known,
    and a fixed number of steps. The shipped base hardly answers by habit, so that its blind answers are
    wrong labels more than temptation. Nothing here is a figure of the paper, nor a reproduction of one.""",
)
