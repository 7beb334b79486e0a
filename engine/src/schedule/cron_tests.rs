//! The wrapper against an oracle that looks at every minute, and changes of clocks by hand.

use super::*;
use chrono::{Datelike, NaiveDate, Timelike};
use proptest::prelude::*;

fn at(text: &str) -> DateTime<Utc> {
    DateTime::parse_from_rfc3339(text).expect("instant").with_timezone(&Utc)
}

/// The next `n` instants as local times with their offset.
fn next(expression: &str, zone: &str, after: &str, n: usize) -> Vec<String> {
    let cron = Cron::parse(expression, zone).expect("expression");
    let mut from = at(after);
    let tz: Tz = zone.parse().expect("zone");
    (0..n)
        .map(|_| {
            from = cron.next_after(from).expect("another");
            from.with_timezone(&tz).format("%a %m-%d %H:%M %z").to_string()
        })
        .collect()
}

#[test]
fn sunday_is_0_and_7_and_monday_is_1() {
    for expression in ["0 9 * * 0", "0 9 * * 7", "0 9 * * sun", "0 9 * * SUN", "0 9 * * 0-0", "0 9 * * sun-sun"] {
        assert_eq!(next(expression, "UTC", "2026-11-25T00:00:00Z", 1), ["Sun 11-29 09:00 +0000"], "{expression}");
    }
    assert_eq!(next("0 9 * * 1", "UTC", "2026-11-25T00:00:00Z", 1), ["Mon 11-30 09:00 +0000"]);
    assert_eq!(
        next("0 9 * * fri-sun", "UTC", "2026-11-25T00:00:00Z", 4),
        ["Fri 11-27 09:00 +0000", "Sat 11-28 09:00 +0000", "Sun 11-29 09:00 +0000", "Fri 12-04 09:00 +0000"]
    );
}

#[test]
fn day_of_month_or_weekday_when_both_are_given() {
    assert_eq!(
        next("0 0 13 * 5", "UTC", "2026-11-01T00:00:00Z", 4),
        ["Fri 11-06 00:00 +0000", "Fri 11-13 00:00 +0000", "Fri 11-20 00:00 +0000", "Fri 11-27 00:00 +0000"]
    );
    assert_eq!(next("0 0 13 * 5", "UTC", "2026-12-12T00:00:00Z", 1), ["Sun 12-13 00:00 +0000"]);
    // A field that begins with `*` is a condition more: odd days that are Mondays.
    assert_eq!(
        next("0 0 */2 * 1", "UTC", "2026-11-01T00:00:00Z", 3),
        ["Mon 11-09 00:00 +0000", "Mon 11-23 00:00 +0000", "Mon 12-07 00:00 +0000"]
    );
}

#[test]
fn a_time_that_does_not_exist_is_the_first_instant_after_the_gap() {
    assert_eq!(
        next("30 2 * * *", "Europe/Berlin", "2026-03-28T00:00:00Z", 3),
        ["Sat 03-28 02:30 +0100", "Sun 03-29 03:00 +0200", "Mon 03-30 02:30 +0200"]
    );
    assert_eq!(
        next("30 2 * * *", "America/New_York", "2026-03-07T12:00:00Z", 2),
        ["Sun 03-08 03:00 -0400", "Mon 03-09 02:30 -0400"]
    );
    // Half an hour in Lord Howe: 02:00 becomes 02:30.
    assert_eq!(
        next("15 2 * * *", "Australia/Lord_Howe", "2026-10-03T00:00:00Z", 2),
        ["Sun 10-04 02:30 +1100", "Mon 10-05 02:15 +1100"]
    );
    // Several that do not exist are one.
    assert_eq!(
        next("*/15 2,3 * * *", "Europe/Berlin", "2026-03-29T00:50:00Z", 3),
        ["Sun 03-29 03:00 +0200", "Sun 03-29 03:15 +0200", "Sun 03-29 03:30 +0200"]
    );
    // Samoa left out a whole day.
    assert_eq!(
        next("0 12 * * *", "Pacific/Apia", "2011-12-29T00:00:00Z", 3),
        ["Thu 12-29 12:00 -1000", "Sat 12-31 00:00 +1400", "Sat 12-31 12:00 +1400"]
    );
}

#[test]
fn a_time_that_comes_twice_is_the_first_of_the_two() {
    assert_eq!(
        next("30 2 * * *", "Europe/Berlin", "2026-10-24T12:00:00Z", 2),
        ["Sun 10-25 02:30 +0200", "Mon 10-26 02:30 +0100"]
    );
    assert_eq!(
        next("30 1 * * *", "America/New_York", "2026-10-31T12:00:00Z", 2),
        ["Sun 11-01 01:30 -0400", "Mon 11-02 01:30 -0500"]
    );
    assert_eq!(
        next("45 1 * * *", "Australia/Lord_Howe", "2026-04-04T00:00:00Z", 2),
        ["Sun 04-05 01:45 +1100", "Mon 04-06 01:45 +1030"]
    );
    // Asked between the two.
    assert_eq!(next("30 2 * * *", "Europe/Berlin", "2026-10-25T00:45:00Z", 1), ["Mon 10-26 02:30 +0100"]);
}

#[test]
fn every_hour_means_every_hour_that_passes() {
    assert_eq!(
        next("15 * * * *", "Europe/Berlin", "2026-03-29T00:00:00Z", 3),
        ["Sun 03-29 01:15 +0100", "Sun 03-29 03:15 +0200", "Sun 03-29 04:15 +0200"]
    );
    assert_eq!(
        next("*/30 * * * *", "Europe/Berlin", "2026-10-25T00:00:00Z", 5),
        [
            "Sun 10-25 02:30 +0200",
            "Sun 10-25 02:00 +0100",
            "Sun 10-25 02:30 +0100",
            "Sun 10-25 03:00 +0100",
            "Sun 10-25 03:30 +0100"
        ]
    );
    assert_eq!(
        next("45 * * * *", "Australia/Lord_Howe", "2026-04-04T14:00:00Z", 3),
        ["Sun 04-05 01:45 +1100", "Sun 04-05 01:45 +1030", "Sun 04-05 02:45 +1030"]
    );
}

#[test]
fn leap_days_and_steps() {
    assert_eq!(
        Cron::parse("0 0 29 2 *", "UTC").expect("read").next_after(at("2026-01-01T00:00:00Z")),
        Some(at("2028-02-29T00:00:00Z"))
    );
    assert_eq!(
        next("50/5 23 31 12 *", "UTC", "2026-11-25T00:00:00Z", 3),
        ["Thu 12-31 23:50 +0000", "Thu 12-31 23:55 +0000", "Fri 12-31 23:50 +0000"]
    );
    assert_eq!(next("@weekly", "UTC", "2026-11-25T00:00:00Z", 1), ["Sun 11-29 00:00 +0000"]);
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_what_to_write() {
    for (text, column, message, help) in [
        ("", 1, "0 fields", "write five"),
        ("* * * *", 8, "4 fields", "`*` for any weekday"),
        ("0 0 3 * * *", 1, "6 fields", "leave out the seconds"),
        ("* * * * * * * *", 11, "8 fields", "write five"),
        ("60 * * * *", 1, "`60` is no minute", "0 to 59"),
        ("0  25 * * *", 4, "`25` is no hour", "0 to 23"),
        ("0 1-24 * * *", 5, "`24` is no hour", "0 to 23"),
        ("0 0 0 * *", 5, "`0` is no day of month", "1 to 31"),
        ("0 0 L * *", 5, "`L` is no day of month", "not supported"),
        ("0 0 ? * 1", 5, "`?`", "write `*`"),
        ("0 0 * january *", 7, "`january` is no month", "write `jan`"),
        ("0 0 * * 8", 9, "`8` is no weekday", "0 to 6"),
        ("0 0 * * 1,x", 11, "`x` is no weekday", "0 to 6"),
        ("0 22-2 * * *", 3, "runs backwards", "`22-23,0-2`"),
        ("0 0 * * 6-2", 9, "runs backwards", "`6-6,0-2`"),
        ("*/0 * * * *", 3, "the step `0`", "`*/5`"),
        ("*/x * * * *", 3, "the step `x`", "`*/5`"),
        ("1,,2 * * * *", 3, "`` is no minute", "missing"),
        ("-1 * * * *", 1, "`-1` is no minute", "0 to 59"),
        ("+1 * * * *", 1, "`+1` is no minute", "0 to 59"),
        ("0 0 30 2 *", 5, "no month", "correct"),
        ("@noon", 1, "`@noon`", "@daily"),
        ("ä * * * *", 1, "`ä` is no minute", "0 to 59"),
    ] {
        let error = Cron::parse(text, "UTC").expect_err(text);
        assert_eq!(error.column, column, "{text}: {error}");
        assert!(error.message.contains(message) && error.help.contains(help), "{text}: {error}");
    }
    let long = format!("{} * * * *", ["1"; 200].join(","));
    assert!(Cron::parse(&long, "UTC").expect_err("long").message.contains("bytes"));
    for (zone, help) in [
        ("Europe/Berlln", "`Europe/Berlin`"),
        ("berlin", "`Europe/Berlin`"),
        ("new york", "`America/New_York`"),
        ("+02:00", "IANA"),
        ("", "IANA"),
    ] {
        let error = Cron::parse("* * * * *", zone).expect_err(zone);
        assert!(error.help.contains(help), "{zone}: {error}");
        assert!(!error.to_string().contains("column"), "{error}");
    }
}

/// A field as text with the numbers that it means.
fn field(min: u8, max: u8) -> impl Strategy<Value = (String, BTreeSet<u8>)> {
    let all: BTreeSet<u8> = (min..=max).collect();
    let item = prop_oneof![
        (min..=max).prop_map(|n| (n.to_string(), BTreeSet::from([n]))),
        (min..=max, min..=max).prop_map(|(a, b)| {
            let (a, b) = (a.min(b), a.max(b));
            (format!("{a}-{b}"), (a..=b).collect())
        }),
        (min..=max, min..=max, 1..=7u8).prop_map(|(a, b, s)| {
            let (a, b) = (a.min(b), a.max(b));
            (format!("{a}-{b}/{s}"), (a..=b).filter(|n| (n - a).is_multiple_of(s)).collect())
        }),
    ];
    prop_oneof![
        3 => Just(("*".to_owned(), all)),
        1 => (1..=7u8).prop_map(move |s| (format!("*/{s}"), (min..=max).filter(|n| (n - min).is_multiple_of(s)).collect())),
        4 => prop::collection::vec(item, 1..4).prop_map(|items| {
            let text = items.iter().map(|(t, _)| t.as_str()).collect::<Vec<_>>().join(",");
            (text, items.into_iter().flat_map(|(_, s)| s).collect())
        }),
    ]
}

/// Looks at every minute of the window, with no calendar but the zone's.
struct Oracle {
    sets: [BTreeSet<u8>; 5],
    or: bool,
    zone: Tz,
}

impl Oracle {
    fn wanted(&self, wall: NaiveDateTime) -> bool {
        let has = |i: usize, n: u32| self.sets[i].contains(&u8::try_from(n).expect("small"));
        let (day, weekday) = (has(2, wall.day()), has(4, wall.weekday().num_days_from_sunday()));
        has(0, wall.minute())
            && has(1, wall.hour())
            && has(3, wall.month())
            && if self.or { day || weekday } else { day && weekday }
    }

    fn instants(&self, from: DateTime<Utc>, minutes: i64) -> Vec<DateTime<Utc>> {
        let wall = |t: DateTime<Utc>| t.with_timezone(&self.zone).naive_local();
        let elapsed = self.sets[1].len() == 24;
        let (mut seen, mut fired) = (BTreeSet::new(), Vec::new());
        // Times of the day before count as seen.
        for back in 1..=1440 {
            seen.insert(wall(from - Duration::minutes(back)));
        }
        for n in 0..minutes {
            let now = from + Duration::minutes(n);
            let mut skipped = false;
            if !elapsed {
                let mut missing = wall(now - Duration::minutes(1)) + Duration::minutes(1);
                while missing < wall(now) {
                    skipped |= self.wanted(missing);
                    missing += Duration::minutes(1);
                }
            }
            let first = seen.insert(wall(now));
            if skipped || self.wanted(wall(now)) && (first || elapsed) {
                fired.push(now);
            }
        }
        fired
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn it_fires_when_an_oracle_that_looks_at_every_minute_does(
        minute in field(0, 59), hour in field(0, 23), day in field(1, 31), month in field(1, 12), weekday in field(0, 6),
        zone in prop::sample::select(vec!["UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Havana",
            "Asia/Kathmandu", "Africa/Casablanca", "Antarctica/Troll"]),
        // Days around changes of clocks in the north, in the south, in Morocco, and any day.
        start in prop_oneof![
            prop::sample::select(vec!["2026-03-28", "2026-10-24", "2026-03-07", "2026-10-31", "2026-04-04", "2026-10-03", "2026-02-14", "2026-03-21"]).prop_map(|d| d.parse::<NaiveDate>().expect("day")),
            (0..3000i64).prop_map(|d| NaiveDate::from_ymd_opt(2024, 1, 1).expect("day") + Duration::days(d)),
        ],
        seconds in 0..86_400i64,
    ) {
        const MINUTES: i64 = 2 * 1440;
        let text = [&minute, &hour, &day, &month, &weekday].map(|f| f.0.as_str()).join(" ");
        let or = !day.0.starts_with('*') && !weekday.0.starts_with('*');
        let cron = match Cron::parse(&text, zone) {
            Ok(cron) => cron,
            Err(error) => {
                prop_assert!(error.message.contains("no month"), "{}: {}", text, error);
                return Ok(());
            }
        };
        let zone: Tz = zone.parse().expect("zone");
        let oracle = Oracle { sets: [minute.1, hour.1, day.1, month.1, weekday.1], or, zone };
        let midnight = start.and_hms_opt(0, 0, 0).expect("midnight").and_utc();
        let wanted = oracle.instants(midnight, MINUTES);
        let mut found = Vec::new();
        let mut from = midnight - Duration::seconds(1);
        while let Some(next) = cron.next_after(from).filter(|t| *t < midnight + Duration::minutes(MINUTES)) {
            found.push(next);
            from = next;
        }
        prop_assert_eq!(&found, &wanted, "{}", text);
        // From anywhere between, the same.
        let between = midnight + Duration::seconds(seconds);
        prop_assert_eq!(
            cron.next_after(between).filter(|t| *t < midnight + Duration::minutes(MINUTES)),
            wanted.iter().find(|t| **t > between).copied(), "{} after {}", text, between
        );
    }

    #[test]
    fn any_text_is_read_or_refused_with_a_place_in_it(text in "[-*/,0-9a-zL#?@ ä]{0,40}") {
        if let Err(error) = Cron::parse(&text, "UTC") {
            prop_assert!(error.column >= 1 && error.column <= text.chars().count() + 1, "{:?}: {}", text, error);
            prop_assert!(!error.help.is_empty());
        }
    }
}
