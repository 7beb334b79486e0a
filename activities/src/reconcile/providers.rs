//! Sums, every day: what the provider says that each of our keys has used since yesterday beside what our books say of it; and, by
//! model, what it charged beside what our price says.

use super::{Books, Output, asked, store, tell};
use crate::{
    billing::books::{self, Finding, Totals},
    decimal::usd_from_pusd,
    provider::{
        ProviderError,
        account::{AccountKey, OpenRouterAccount},
    },
};
use loopwright_engine::{Failure, transaction};
use std::collections::BTreeMap;

const JOB: &str = "reconcile-providers";
/// A difference that is told: more than both. Source: money.md, section 5.
const DIFFERENCE_PUSD: i128 = 100_000_000_000;
const DIFFERENCE_BPS: i128 = 50;
/// A price that is told as stale. Source: money.md, section 5.
const DRIFT_BPS: i64 = 200;
/// Digits of a fingerprint that name a key in a finding, beside its last four characters.
const NAME_DIGITS: usize = 8;

/// A key, and what its provider says that it and its account have used.
type Said = (AccountKey, i64, i64);

/// A key and its sums at the last look and now.
struct Looked {
    key: AccountKey,
    before: Totals,
    now: Totals,
}

pub(super) async fn run(b: &Books) -> Result<Output, Failure> {
    let mut found = Vec::new();
    let mut done = Output::default();
    // No connection is held while the provider is asked.
    let mut unread = Vec::new();
    let said = match &b.openrouter {
        Some(account) => ask(account, &mut unread).await,
        None => Vec::new(),
    };
    if said.is_empty() {
        if let Some(error) = unread.pop() {
            return Err(asked(error));
        }
        done.skipped = "OpenRouter is not configured; only prices were compared".into();
    }
    // The sums are kept with what they showed, or not at all: who dies between compares the same sums again.
    let mut tx = transaction::begin(&b.pool).await.map_err(|e| store(&e))?;
    let mut looked = Vec::new();
    for (key, usage, whole) in said {
        let own = books::owed(&mut tx, "openrouter", key.fingerprint()).await.map_err(|e| store(&e))?;
        let now = Totals { usage: usage.into(), account: whole.into(), own };
        let before = books::keep_totals(&mut tx, "openrouter", key.fingerprint(), now).await;
        done.checked += 1;
        if let Some(before) = before.map_err(|e| store(&e))? {
            looked.push(Looked { key, before, now });
        }
    }
    found.extend(looked.iter().filter_map(difference));
    found.extend(accounts(&looked));
    for drift in books::drifted(&mut tx, DRIFT_BPS).await.map_err(|e| store(&e))? {
        let (theirs, ours) = (usd_from_pusd(drift.provider_cost.0.into()), usd_from_pusd(drift.own_cost.0.into()));
        found.push(Finding {
            kind: "price_stale",
            subject: format!("{}/{}", drift.provider, drift.model),
            message: format!(
                "the provider charged {theirs} USD in a day, our price says {ours}; `loopwright pricing sync`"
            ),
            user: None,
        });
    }
    // What was found of a key that could not be asked now still stands.
    let new = books::keep_findings(&mut tx, JOB, &found, unread.is_empty()).await.map_err(|e| store(&e))?;
    tx.commit().await.map_err(|e| store(&e))?;
    tell(JOB, &new);
    done.findings = u64::try_from(found.len()).unwrap_or(u64::MAX);
    Ok(done)
}

/// Asks with every key: first what each has used, then what their accounts have, so that no account seems to have used less than
/// its keys. One that is refused does not keep the others from being compared.
async fn ask(account: &OpenRouterAccount, unread: &mut Vec<ProviderError>) -> Vec<Said> {
    let mut used = Vec::new();
    for key in account.keys().await {
        match account.used_by_key(&key).await {
            Ok(usage) => used.push((key, usage)),
            Err(error) => not_read(&key, error, unread),
        }
    }
    let mut said = Vec::new();
    for (key, usage) in used {
        match account.used_by_account(&key).await {
            Ok(whole) => said.push((key, usage, whole)),
            Err(error) => not_read(&key, error, unread),
        }
    }
    said
}

fn not_read(key: &AccountKey, error: ProviderError, unread: &mut Vec<ProviderError>) {
    tracing::warn!(ends_in = key.last4(), code = %error.failure.code, "the sums of a key could not be read; `loopwright api-keys list`");
    unread.push(error);
}

/// What is to be said of a key between two looks. The account's sum includes other keys and fees: it is only told when it
/// rose by less than the key did, which cannot be.
fn difference(looked: &Looked) -> Option<Finding> {
    let (theirs, ours, whole) = growth(looked);
    let usd = usd_from_pusd;
    let message = if differs(theirs, ours) {
        format!("{} used {} USD since the last look, our books say {}", name(&looked.key), usd(theirs), usd(ours))
    } else if theirs - whole > DIFFERENCE_PUSD {
        let key = name(&looked.key);
        format!("{key} used {} USD since the last look, its whole account only {}", usd(theirs), usd(whole))
    } else {
        return None;
    };
    Some(finding(&looked.key, message))
}

/// What is to be said of accounts with several of our keys: all of them together cannot have used more than the account. Which
/// keys share one is seen by its sums: equal to the pico-USD at both looks. Where calls between two questions hide that, each key
/// is still compared by itself.
fn accounts(looked: &[Looked]) -> Vec<Finding> {
    let mut shared: BTreeMap<(i128, i128), Vec<&Looked>> = BTreeMap::new();
    for one in looked {
        shared.entry((one.before.account, one.now.account)).or_default().push(one);
    }
    let several = shared.into_values().filter(|keys| keys.len() > 1);
    several
        .filter_map(|keys| {
            let theirs: i128 = keys.iter().map(|one| growth(one).0).sum();
            let whole = growth(keys[0]).2;
            let alone = keys.iter().any(|one| growth(one).0 - whole > DIFFERENCE_PUSD);
            if alone || theirs - whole <= DIFFERENCE_PUSD {
                return None;
            }
            let (theirs, whole) = (usd_from_pusd(theirs), usd_from_pusd(whole));
            let message =
                format!("{} keys used {theirs} USD since the last look, their account only {whole}", keys.len());
            let first = finding(&keys[0].key, message);
            Some(Finding { subject: format!("{} account", first.subject), ..first })
        })
        .collect()
}

/// By the provider, by our books, of the account.
fn growth(looked: &Looked) -> (i128, i128, i128) {
    let Looked { before, now, .. } = looked;
    (now.usage - before.usage, now.own - before.own, now.account - before.account)
}

fn differs(theirs: i128, ours: i128) -> bool {
    let apart = (theirs - ours).abs();
    let largest = theirs.abs().max(ours.abs());
    apart > DIFFERENCE_PUSD || (apart * 10_000 > DIFFERENCE_BPS * largest && largest > 0)
}

fn name(key: &AccountKey) -> String {
    if key.last4().is_empty() { "a key".to_owned() } else { format!("the key that ends in {}", key.last4()) }
}

fn finding(key: &AccountKey, message: String) -> Finding {
    let digits = key.fingerprint().get(..NAME_DIGITS).unwrap_or_default();
    Finding { kind: "total_differs", subject: format!("openrouter/{digits}"), message, user: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> AccountKey {
        AccountKey::of(&text.into()).unwrap()
    }

    fn usd(n: i128) -> i128 {
        n * 1_000_000_000_000 / 1_000
    }

    /// Growth in thousandths of a USD.
    fn looked(usage: i128, own: i128, account: i128) -> Looked {
        let before = Totals { usage: usd(1_000), account: usd(1_000), own: usd(900) };
        let now = Totals {
            usage: before.usage + usd(usage),
            account: before.account + usd(account),
            own: before.own + usd(own),
        };
        Looked { key: key("sk-or-v1-0123456789"), before, now }
    }

    #[test]
    fn half_a_percent_or_ten_cents_apart_is_told() {
        let told = |usage: i128, own: i128| difference(&looked(usage, own, usage)).is_some();
        assert!(!told(1_000, 1_000) && !told(1_000, 996) && !told(0, 0));
        assert!(told(1_000, 994) && told(100_000, 99_880) && told(0, 200) && told(10, 0));
        let short = difference(&looked(1_000, 1_000, 0)).expect("an account that rises less than its key");
        assert!(short.message.contains("ends in 6789 used 1 USD") && !short.message.contains("0123456789"));
    }

    #[test]
    fn keys_of_one_account_cannot_have_used_more_than_it() {
        let one = |usage, account| looked(usage, usage, account);
        assert!(accounts(&[one(600, 1_000), one(400, 1_000)]).is_empty());
        let told = accounts(&[one(600, 1_000), one(600, 1_000)]);
        assert!(told.len() == 1 && told[0].message.contains("2 keys used 1.2 USD"), "{told:?}");
        assert!(accounts(&[one(600, 600), one(600, 700)]).is_empty(), "two accounts");
        assert!(accounts(&[one(2_000, 1_000), one(0, 1_000)]).is_empty(), "told of the key already");
    }
}
