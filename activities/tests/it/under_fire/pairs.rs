//! The pairs: every fault of a provider, every moment at which a worker dies, a dialect or all; and what answers report and cost.

use super::*;

/// What the models cost here, by provider and model: input, cached input, output, reasoning, in pico-USD a token. Written into the
/// database by this test, and used by its own arithmetic. OpenRouter says itself what an answer costs.
pub(super) const PRICES: [(&str, &str, [i64; 4]); 3] = [
    ("gemini", "gemini-3.5-flash-lite", [301_000, 29_000, 2_503_000, 2_399_000]),
    ("gemini", "gemini-3.8-flash", [751_000, 73_000, 3_761_000, 3_709_000]),
    ("openai_compatible", "some-model", [101_000, 53_000, 401_000, 307_000]),
];

/// What answer `n` of the provider reports: no two that follow each other are alike.
pub(super) fn told(n: usize) -> Told {
    let n = n as u64;
    Told {
        prompt: 20 + n % 13,
        cached: n % 7,
        output: 10 + n % 11,
        reasoning: n % 5,
        cost: format!("0.000300000{:03}", n % 1_000),
    }
}

/// What an answer costs, in pico-USD. Shares nothing with the ledger.
pub(super) fn cost_of(provider: &str, model: &str, usage: &Told) -> Option<i128> {
    if provider == "openrouter" {
        // Twelve decimals of a USD.
        return usage.cost.strip_prefix("0.")?.parse().ok();
    }
    let (.., [input, cached, output, reasoning]) = PRICES.iter().find(|(p, m, _)| (*p, *m) == (provider, model))?;
    let part = |tokens: u64, price: &i64| i128::from(tokens) * i128::from(*price);
    Some(
        part(usage.prompt - usage.cached, input)
            + part(usage.cached, cached)
            + part(usage.output - usage.reasoning, output)
            + part(usage.reasoning, reasoning),
    )
}

/// When the first worker dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Death {
    Never,
    /// At a crash point of the engine, the n-th time that it gets there. Those that a call passes are passed once more by the
    /// second call.
    Point(&'static str, u32),
    PointOfCall(&'static str),
    /// Two workers: one at a point, and the one behind it at another, the first time that each gets there.
    Second(&'static str, &'static str),
    /// Killed when the provider has got the question.
    Sent,
    /// Killed when the provider has sent its headers.
    Headers,
}

pub(super) const DEATHS: [(&str, Death); 8] = [
    ("never", Death::Never),
    ("before send", Death::PointOfCall("open.after_commit")),
    ("after send", Death::Sent),
    ("after headers", Death::Headers),
    ("after reply", Death::PointOfCall("meter.after_fence")),
    ("after the answer is recorded", Death::PointOfCall("meter.after_commit")),
    // The first time is the attempt's start.
    ("before settle", Death::Point("settle.before_hook", 2)),
    ("after settle", Death::Point("commit.after_commit", 2)),
];

/// Faults after which the run cannot get an answer: its only key or address is of no use.
pub(super) const FINAL: [(Fault, &str); 2] =
    [(Fault::BadKey, "provider.key_invalid"), (Fault::NoBalance, "provider.no_balance")];

pub(super) fn faults() -> Vec<Option<Fault>> {
    use Fault as F;
    let faults = [
        F::ResetBeforeHeaders,
        F::CloseBeforeHeaders,
        F::ResetAfterHeaders,
        F::ResetMidBody,
        F::CloseMidBody,
        F::CloseAfterFinish,
        F::NoFinishReason,
        F::NoDone,
        F::StallBeforeHeaders,
        F::StallAfterHeaders,
        F::StallMidBody,
        F::CommentsOnly,
        F::CommentsForever,
        F::Split,
        F::OneByte,
        F::ErrorMidStream,
        F::ErrorInside,
        F::RateLimited(None),
        F::RateLimited(Some(1)),
        F::NoBalance,
        F::BudgetInFlight,
        F::BadKey,
        F::HtmlError,
        F::HtmlPage,
        F::UsageAbsent,
        F::UsageTwice,
        F::UnknownFinishReason,
        F::HugeBody,
        F::HugeError,
        F::Gzip,
        F::GzipDamaged,
        F::GzipBomb,
    ];
    std::iter::once(None).chain(faults.map(Some)).collect()
}

/// What the books have to say of a question that was answered so, by the journal, and whose worker lived: its state, and HTTP status.
/// An answer that was lost on its way may have been billed, so it is unknown; who said no, or ended what was said too early, bills
/// nothing. Shares nothing with the classification of errors.
pub(super) fn answer_of(answered: &str, dialect: Dialect) -> (&'static str, &'static [Option<i32>]) {
    use Fault as F;
    if answered == "reply" {
        return ("succeeded", &[Some(200)]);
    }
    let fault = faults().into_iter().flatten().find(|fault| format!("{fault:?}") == answered);
    match fault.unwrap_or_else(|| panic!("no pair asks for {answered}")) {
        F::CloseAfterFinish | F::NoDone | F::Split | F::OneByte | F::UsageAbsent | F::UsageTwice | F::Gzip => {
            ("succeeded", &[Some(200)])
        }
        F::ResetBeforeHeaders | F::CloseBeforeHeaders | F::StallBeforeHeaders => ("unknown", &[None]),
        // A reset may overtake what was sent before it.
        F::ResetAfterHeaders | F::ResetMidBody => ("unknown", &[Some(200), None]),
        F::CloseMidBody | F::StallAfterHeaders | F::StallMidBody | F::CommentsForever => ("unknown", &[Some(200)]),
        F::HugeBody | F::GzipDamaged | F::GzipBomb | F::HtmlPage => ("unknown", &[Some(200)]),
        F::NoFinishReason | F::UnknownFinishReason | F::CommentsOnly => ("failed", &[Some(200)]),
        // The code inside the error counts; one without a number is the server's fault.
        F::ErrorInside if dialect == Dialect::OpenAi => ("failed", &[Some(500)]),
        F::ErrorInside => ("failed", &[Some(503)]),
        F::ErrorMidStream => match dialect {
            Dialect::Gemini => ("failed", &[Some(503)]),
            Dialect::OpenRouter => ("failed", &[Some(502)]),
            Dialect::OpenAi => ("failed", &[Some(500)]),
        },
        F::BadKey => ("failed", &[Some(401)]),
        F::NoBalance | F::BudgetInFlight => ("failed", &[Some(402)]),
        F::RateLimited(_) => ("failed", &[Some(429)]),
        F::HtmlError => ("failed", &[Some(500)]),
        F::HugeError => ("failed", &[Some(503)]),
        F::Redirect(_) => panic!("no pair redirects"),
    }
}

/// One pair at one dialect.
#[derive(Clone)]
pub(super) struct Pair {
    pub(super) n: usize,
    /// Which of its runs, from 0; what is known by key or queue is that of one run.
    pub(super) round: usize,
    pub(super) dialect: Dialect,
    pub(super) fault: Option<Fault>,
    /// Nothing listens where the provider should be, until a call was refused there.
    pub(super) refused: bool,
    pub(super) death: (&'static str, Death),
}

impl Pair {
    /// The same in another run.
    pub(super) fn of_round(&self, round: usize) -> Self {
        Self { round, ..self.clone() }
    }
    /// Each run of a pair has a key of its own: what becomes of one key concerns nobody else.
    pub(super) fn key(&self) -> String {
        format!("sk-under-fire-{:05}-{}", self.n, self.round)
    }
    pub(super) fn fingerprint(&self) -> String {
        KeyIdentity::of(self.dialect.name(), Some(&SecretString::from(self.key()))).fingerprint
    }
    pub(super) fn queue(&self) -> String {
        format!("pair-{}-{}", self.n, self.round)
    }
    pub(super) fn name(&self) -> String {
        let fault = if self.refused { "ConnectionRefused".to_owned() } else { format!("{:?}", self.fault) };
        format!("{fault}, dies {}, {}, call {}", self.death.0, self.dialect.name(), ["a", "b"][self.struck()])
    }
    /// What points a process at the fake, or at `door` in its place, with this pair's key.
    pub(super) fn environment(&self, fake: &FakeProvider, door: Option<SocketAddr>) -> BTreeMap<&'static str, String> {
        let mut all: BTreeMap<_, _> = fake.environment(&[self.dialect], &self.key()).into_iter().collect();
        if let Some(door) = door {
            let address = address(&fake.base_of(self.dialect)).to_owned();
            all.values_mut().for_each(|value| *value = value.replace(&address, &door.to_string()));
        }
        all.insert("OPENAI_MODEL", "some-model".into());
        all
    }
    /// Which of the two calls is struck: the second, so that a finished one is there that must not be bought again, or the first.
    pub(super) fn struck(&self) -> usize {
        self.n % 2
    }
    /// Whether a rule gives back what it pays: a worker dies while that is done.
    pub(super) fn gets_back(&self) -> bool {
        gives_back(self.death.0)
    }
    /// Whether its run has what it may spend from the run before it: a worker dies when that has been written for it.
    pub(super) fn inherits(&self) -> bool {
        ["bill.after_caps", "call.after_caps"].contains(&self.death.0)
    }
    /// Whether its provider names costs that nobody believes: such a call is closed in a transaction, and not by one statement.
    pub(super) fn doubts(&self) -> bool {
        ["close.", "doubt."].iter().any(|begins| self.death.0.starts_with(begins))
    }
    /// What answer `n` of the provider reports to it.
    pub(super) fn told(&self, n: usize) -> Told {
        let told = told(n);
        if self.doubts() { Told { cost: "90.5".into(), ..told } } else { told }
    }
    /// What becomes of this key's n-th question.
    ///
    /// Behind a question or headers the killed worker's answer is held, and the fault is the next question's, which its successor asks:
    /// who is killed before an answer breaks never learns that it does, whatever would have come. Fault and death meet in one call where
    /// the worker has met the fault and dies with what it knows of it: after the reply, before and after that is recorded.
    pub(super) fn fault_of(&self, nth: usize) -> Option<Fault> {
        let held = match self.death.1 {
            Death::Sent => Some(Fault::StallBeforeHeaders),
            Death::Headers => Some(Fault::StallAfterHeaders),
            _ => None,
        };
        match (nth.checked_sub(self.struck())?, held) {
            (0, Some(held)) => Some(held),
            (0, None) | (1, Some(_)) => self.fault.clone(),
            // A bad key stays one.
            _ if FINAL.iter().any(|(fault, _)| Some(fault) == self.fault.as_ref()) => self.fault.clone(),
            _ => None,
        }
    }
}

/// Whether a crash point is passed only where a rule gives credits back.
pub(super) fn gives_back(point: &str) -> bool {
    point.starts_with("refund.") || point.starts_with("grant.")
}

/// Host and port of a URL.
pub(super) fn address(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

pub(super) fn pairs() -> Vec<Pair> {
    let wanted = std::env::var(MATRIX).unwrap_or_default();
    let full = wanted == "full";
    let mut pairs = Vec::new();
    for (f, fault) in faults().into_iter().enumerate() {
        for (d, death) in DEATHS.into_iter().enumerate() {
            let dialects = if full { Dialect::ALL.to_vec() } else { vec![Dialect::ALL[(f + d) % 3]] };
            for dialect in dialects {
                // The parity decides which call is struck.
                let n = pairs.len() * 2 + (f + d / 2) % 2;
                pairs.push(Pair { n, round: 0, dialect, fault: fault.clone(), refused: false, death });
            }
        }
    }
    for (d, death) in DEATHS.into_iter().enumerate() {
        let dialects = if full { Dialect::ALL.to_vec() } else { vec![Dialect::ALL[d % 3]] };
        for dialect in dialects {
            let n = pairs.len() * 2 + d / 2 % 2;
            pairs.push(Pair { n, round: 0, dialect, fault: None, refused: true, death });
        }
    }
    pairs.retain(|pair| full || pair.name().contains(&wanted));
    assert!(!pairs.is_empty(), "no pair is called {wanted}");
    pairs
}
