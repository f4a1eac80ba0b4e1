"""What each logged metric is measured in, and how to read its curve."""

from __future__ import annotations

# Columns of metrics.jsonl that count and are no measurement.
COUNTERS = ("update", "num_updates", "tokens", "targets", "seconds", "eta_seconds")
# Measurements for a closer look (machine, optimizer, checks of the method); they fold away.
FOLDED = (
    *("lr", "grad_norm", "tokens_per_second"),
    *("rl/approx_kl", "rl/ratio_mean", "rl/clip_low_fraction", "rl/clip_high_fraction", "rl/unjudged"),
    *("online/unjudged", "online/other_reward", "xpo/reference_logprob"),
    *("rl/sampler_gap", "rl/sampler_gap_max", "rl/mismatch_mean", "rl/mismatch_max", "rl/mismatch_kl"),
    *("rl/importance_mean", "rl/importance_capped_fraction", "rl/kl_penalty", "rl/kl_beta", "grad_norm/critic"),
    *("ppo/policy_loss", "ppo/value_clip_fraction", "ppo/value_mean", "ppo/return_mean"),
    *("dpo/chosen_logprob", "dpo/rejected_logprob", "dpo/chosen_reward", "dpo/rejected_reward"),
    *("reward/chosen", "reward/rejected", "steps/right", "steps/label"),
)
# The likelihood that every arm of mid-training logs in the same way, whatever its objective.
PLAIN_NLL = "ntp/nll"

# (unit, how to read it) by name; a loss has its words by stage.
WORDS = {
    "lr": ("learning rate", "The learning rate of each update."),
    "grad_norm": ("norm of the gradient", "The norm of the gradient before clipping. Spikes are unstable updates."),
    "tokens_per_second": ("tokens per second", "Speed of training; it changes nothing in the result."),
    PLAIN_NLL: (
        "nats per token",
        "The plain negative log-likelihood of the text that the stage reads, unweighted, so arms can be compared.",
    ),
    "remit/clip_fraction": (
        "share of tokens",
        "The share of tokens whose weight was clipped. Near one, the weights are all or nothing.",
    ),
    "remit/mean_abs_delta": (
        "nats per token",
        "How far reference and learner disagree. Near zero all weights are one: plain next-token prediction.",
    ),
    "remit/mean_weight": (
        "token weight",
        "The average weight. Below one the stage also takes smaller steps than next-token prediction.",
    ),
    "dft/probability": (
        "probability",
        "DFT: how likely the model finds the tokens that it is trained on, which is the weight of their losses.",
    ),
    "rho1/kept_fraction": ("share of tokens", "The share of tokens that the loss keeps."),
    "rho1/kept_excess": ("nats per token", "How much better the reference predicts the kept tokens."),
    "rho1/mean_excess": ("nats per token", "How much better the reference predicts all tokens."),
    "distill/kl": ("nats per token", "How far the learner's distribution is from the reference's; it should fall."),
    "distill/covered": (
        "share of probability",
        "How much of the reference's probability lies on the tokens that were kept; the rest is not distilled.",
    ),
    "rl/reward": (
        "share of right answers",
        "The share of sampled answers that the verifier calls right; with another source of rewards, the mean of its "
        "rewards. A reward that rises while the benchmarks do not is being gamed.",
    ),
    "rl/right": ("share of answers", "Answers that the verifier calls right, where the reward is more than that."),
    "rl/greedy_reward": ("reward", "Mean reward of the greedy answers, which is the baseline of the others."),
    "rl/unparsed": (
        "share of answers",
        "Answers in which a verifier found no result (reward 0), or for which a reward function returned None (left "
        "out).",
    ),
    "rl/unjudged": ("share of answers", "Answers that the verifier or the judge gave up on. They should be none."),
    "rl/length": ("tokens", "The average length of a sampled answer."),
    "rl/cut_off": ("share of answers", "Answers that hit the length limit. Many of them mean that the limit is low."),
    "rl/equal_groups": (
        "share of prompts",
        "Prompts whose answers were all right or all wrong. They teach nothing; near one, the step is empty.",
    ),
    "rl/entropy": ("nats per token", "How undecided the model is. A fall to zero: it always gives the same answer."),
    "rl/kl": ("nats per token", "How far the model has moved from where it started."),
    "rl/kl_start": (
        "nats per token",
        "How far the model has moved from where RL started, over the first groups of each rollout. Nothing pulls it "
        "back (kl_beta is 0).",
    ),
    "rl/approx_kl": ("nats per token", "How far the model has moved from the one that wrote the samples."),
    "rl/ratio_mean": ("ratio", "New over old probability of the sampled tokens; near one the samples are on policy."),
    "rl/clip_low_fraction": ("share of tokens", "Wrong-answer tokens past the lower clipping bound: no gradient."),
    "rl/clip_high_fraction": ("share of tokens", "Right-answer tokens past the upper clipping bound: no gradient."),
    "rl/sampler_gap": (
        "nats per token",
        "How far the generator's log-probabilities are from the trainer's. It should be next to nothing.",
    ),
    "rl/sampler_gap_max": ("nats", "The largest gap of a single token between generator and trainer."),
    "online/win_rate": (
        "share of comparisons",
        "How often the policy's answers beat the other side's (the reference's, or the mixture's); a tie counts half. "
        "At the start it is a half.",
    ),
    "online/ties": ("share of comparisons", "Comparisons of equal rewards. They teach little; near one, nothing."),
    "online/unjudged": ("share of comparisons", "Comparisons with an answer that was not judged. They should be none."),
    "online/other_reward": ("reward", "The average reward of the other side's answers."),
    "xpo/reference_logprob": (
        "nats per answer",
        "How likely the policy finds what the reference writes. XPO's optimism pushes it down, slowly.",
    ),
    "nash/preference": (
        "probability",
        "How probable it is that the policy's answer is the better one; ties are a half.",
    ),
    "nash/log_ratio": ("nats per answer", "How far the policy has moved from the reference, over its own answers."),
    "rl/mismatch_mean": (
        "nats per token",
        "How far the generator's log-probabilities are from the trainer's before it learns from the samples.",
    ),
    "rl/mismatch_max": ("nats", "The largest such gap of a single token."),
    "rl/mismatch_kl": (
        "nats per token",
        "The same as a divergence. If it is more than next to nothing, set importance_cap.",
    ),
    "rl/importance_mean": ("weight", "Mean weight by which the generator's mismatch is corrected; near one is good."),
    "rl/importance_capped_fraction": ("share of tokens", "Tokens whose weight was cut at importance_cap."),
    "rl/kl_penalty": ("reward", "What the KL penalty takes off the reward of an answer, on the average."),
    "rl/kl_beta": ("weight", "Weight of the KL penalty, where it is steered towards kl_target."),
    "grad_norm/critic": ("norm of the gradient", "The norm of the critic's gradient before clipping."),
    "ppo/policy_loss": ("loss", "The policy's part of the loss. It hovers around zero; the reward counts."),
    "ppo/value_loss": ("reward squared", "Half the squared error of the critic; it should fall."),
    "ppo/explained_variance": (
        "share of variance",
        "How much of what makes returns differ the critic knew before. Near one is good; below zero it misleads.",
    ),
    "ppo/value_clip_fraction": ("share of tokens", "Values past the clipping bound: no gradient."),
    "ppo/value_mean": ("reward", "What the critic expects, on the average."),
    "ppo/return_mean": ("reward", "What it should have expected."),
    "dpo/accuracy": ("share of pairs", "Pairs in which the model favours the chosen answer more than it did before."),
    "dpo/margin": ("beta x nats", "How much more the chosen answer has gained than the rejected one."),
    "dpo/chosen_logprob": ("nats per answer", "Log-probability of the chosen answers; a long fall is a bad sign."),
    "dpo/rejected_logprob": ("nats per answer", "Log-probability of the rejected answers."),
    "dpo/chosen_reward": ("beta x nats", "What the chosen answers have gained over the starting model."),
    "dpo/rejected_reward": ("beta x nats", "What the rejected answers have gained over the starting model."),
    "dpo/nll": ("nats per token", "Negative log-likelihood of the chosen answers, where it is a part of the loss."),
    "dpo/pair_weight": ("weight of a pair", "WPO: how likely the model is to write both answers itself."),
    "dpo/anchor": (
        "nats per answer",
        "What an answer's gain is held against: KTO's estimate of the divergence, or BCO's shift.",
    ),
    "reward/accuracy": ("share of pairs", "Pairs that the reward model ranks as people did, before the update."),
    "reward/margin": ("reward", "How much higher the chosen answers are rated than the rejected ones."),
    "reward/chosen": ("reward", "Rewards of the chosen answers; only differences mean something."),
    "reward/rejected": ("reward", "Rewards of the rejected answers."),
    "steps/accuracy": ("share of steps", "Steps that are called right or wrong as they are labelled."),
    "steps/right": ("probability", "How likely a step is held to be right, on average; near the labels' mean."),
    "steps/label": ("label", "The labels' mean: the share of right steps."),
}

LOSS_WORDS = {
    "pretrain": ("nats per token", "The loss that the stage minimises; it should fall and level off."),
    "sft": (
        "nats per token",
        "The loss on the assistant's tokens; it should fall and level off. DFT's is no likelihood and may rise.",
    ),
    "midtrain": (
        "nats per token",
        "The loss that each arm minimises. Arms weight, select or distil tokens, so their losses are not on one scale: "
        f"compare {PLAIN_NLL} instead.",
    ),
    "grpo": ("loss", "The loss of the policy gradient. It hovers around zero and says little; the reward counts."),
    "online": (
        "loss",
        "The loss on fresh answers. DPO's starts at ln 2 = 0.693; Nash-MD's value says nothing. The reward counts.",
    ),
    "reward_model": ("nats per pair", "The comparison loss; ln 2 = 0.693 is telling no answers apart."),
    "process_reward_model": ("nats per step", "The cross-entropy of the steps' labels."),
    "rloo": ("loss", "The loss of the policy gradient. It hovers around zero and says little; the reward counts."),
    "reinforce_pp": ("loss", "The loss of the policy gradient. It hovers around zero; the reward counts."),
    "remax": ("loss", "The loss of the policy gradient. It hovers around zero; the reward counts."),
    "ppo": ("loss", "The policy's loss and the critic's together; the reward and ppo/value_loss say more."),
    "dpo": ("loss", "The preference loss. Plain DPO's starts at ln 2 = 0.693, where the model prefers neither answer."),
}


def describe_metric_words(step: str, name: str) -> tuple[str, str]:
    """Unit and reading of metric `name` in the stage `step`; plain words for a metric that is not known here."""
    if name == "loss":
        return LOSS_WORDS.get(step, ("loss", "The loss that the stage minimises."))
    return WORDS.get(name, (name.rsplit("/", 1)[-1].replace("_", " "), "One line an arm, as the stage logged it."))
