//! Units: the pieces of a file that are ranked and packed.
//!
//! A function, a method or a small type with the comments above it; a long function in windows; the rest of the file in
//! windows. Together they cover every line that holds a word, no line twice.

use super::{extract::Def, lang::Lang};
use serde::{Deserialize, Serialize};

/// Lines of a window over text without structure: what fits a screen.
const WINDOW_LINES: u32 = 50;
/// Longest function that is one unit.
const FUNCTION_LINES_MAX: u32 = 80;
/// Longest type that is one unit though it holds functions: a look at it costs less than its parts.
const SMALL_TYPE_LINES_MAX: u32 = 15;

/// A piece of a file; lines are 1-based and inclusive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Unit {
    pub(super) start: u32,
    pub(super) end: u32,
    /// The definition whose text this is, by its place in the file's list.
    pub(super) def: Option<u32>,
    pub(super) bytes: usize,
    /// For a window of a long function: the lines of its signature, which stand further up.
    pub(super) head: Option<(u32, u32)>,
}

/// Cuts a file.
pub(super) fn units(lang: Option<Lang>, defs: &[Def], text: &str) -> Vec<Unit> {
    let lines: Vec<&str> = text.lines().collect();
    let mut cut = Cut { lang, defs, lines: &lines, taken: vec![false; lines.len()], units: Vec::new() };
    let mut children: Vec<Vec<usize>> = vec![Vec::new(); defs.len()];
    let mut has_function = vec![false; defs.len()];
    let mut top = Vec::new();
    for (ord, def) in defs.iter().enumerate() {
        match def.outer {
            Some(outer) => children[outer as usize].push(ord),
            None => top.push(ord),
        }
    }
    // Outer definitions stand before inner ones, so one pass from the end carries the answer up.
    for ord in (0..defs.len()).rev() {
        if let Some(outer) = defs[ord].outer
            && (defs[ord].is_function() || has_function[ord] || defs[ord].kind == "section")
        {
            has_function[outer as usize] = true;
        }
    }
    let mut stack: Vec<usize> = top.into_iter().rev().collect();
    while let Some(ord) = stack.pop() {
        let def = &defs[ord];
        let long = def.end - def.start + 1;
        if def.is_function() {
            cut.function(ord);
        } else if def.is_container() && long <= if has_function[ord] { SMALL_TYPE_LINES_MAX } else { WINDOW_LINES } {
            cut.whole(ord);
        } else {
            stack.extend(children[ord].iter().rev());
        }
    }
    cut.rest();
    cut.units.sort_by_key(|unit| (unit.start, unit.end));
    cut.units
}

struct Cut<'a> {
    lang: Option<Lang>,
    defs: &'a [Def],
    lines: &'a [&'a str],
    taken: Vec<bool>,
    units: Vec<Unit>,
}

impl Cut<'_> {
    fn line(&self, number: u32) -> &str {
        self.lines.get(number as usize - 1).copied().unwrap_or_default()
    }

    fn is_free(&self, number: u32) -> bool {
        self.taken.get(number as usize - 1).is_some_and(|taken| !taken)
    }

    fn take(&mut self, start: u32, end: u32, def: Option<u32>, head: Option<(u32, u32)>) {
        for number in start..=end {
            if let Some(taken) = self.taken.get_mut(number as usize - 1) {
                *taken = true;
            }
        }
        let bytes = (start..=end).map(|number| self.line(number).len() + 1).sum();
        self.units.push(Unit { start, end, def, bytes, head });
    }

    /// The free lines of a definition, with the comments and attributes right above it.
    fn span(&self, ord: usize) -> Option<(u32, u32)> {
        let def = &self.defs[ord];
        let end = def.end.min(u32::try_from(self.lines.len()).unwrap_or(u32::MAX));
        let mut start = (def.start..=end).find(|number| self.is_free(*number))?;
        if start == def.start {
            while start > 1 && self.is_free(start - 1) && self.leads(self.line(start - 1)) {
                start -= 1;
            }
        }
        // A definition inside of one that is taken already ends before its end.
        let end = (start..=end).take_while(|number| self.is_free(*number)).last()?;
        Some((start, end))
    }

    fn whole(&mut self, ord: usize) {
        if let Some((start, end)) = self.span(ord) {
            self.take(start, end, u32::try_from(ord).ok(), None);
        }
    }

    fn function(&mut self, ord: usize) {
        let Some((start, end)) = self.span(ord) else { return };
        let def = u32::try_from(ord).ok();
        if end - start < FUNCTION_LINES_MAX {
            return self.take(start, end, def, None);
        }
        let head = (self.defs[ord].start, self.defs[ord].head_end);
        let mut from = start;
        while from <= end {
            let mut to = (from + WINDOW_LINES - 1).min(end);
            // No window of a few lines at the end.
            if end - to < WINDOW_LINES / 4 {
                to = end;
            }
            self.take(from, to, def, (from > head.1).then_some(head));
            from = to + 1;
        }
    }

    /// Whether a line belongs to the definition below it.
    fn leads(&self, line: &str) -> bool {
        let line = line.trim_start();
        let hash = self.lang.is_some_and(Lang::has_hash_comments) && line.starts_with('#') && !line.starts_with("#!");
        hash || ["//", "/*", "*", "#[", "@", "<!--"].iter().any(|start| line.starts_with(start))
    }

    /// Windows over what no definition took.
    fn rest(&mut self) {
        let count = u32::try_from(self.lines.len()).unwrap_or(u32::MAX);
        let says = |cut: &Self, number: u32| cut.line(number).chars().any(char::is_alphanumeric);
        let mut number = 1;
        while number <= count {
            if !self.is_free(number) || !says(self, number) {
                number += 1;
                continue;
            }
            let start = number;
            let mut end = number;
            while number <= count && number < start + WINDOW_LINES && self.is_free(number) {
                if says(self, number) {
                    end = number;
                }
                number += 1;
            }
            self.take(start, end, None, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::extract::extract;

    fn cut(lang: Lang, text: &str) -> Vec<(u32, u32, Option<String>)> {
        let defs = extract(lang, text).defs;
        let name = |unit: &Unit| unit.def.map(|ord| defs[ord as usize].name.clone());
        units(Some(lang), &defs, text).iter().map(|unit| (unit.start, unit.end, name(unit))).collect()
    }

    #[test]
    fn functions_take_their_comments_and_the_rest_is_windows() {
        let text = "use a::b;\n\n/// Doc.\n#[test]\nfn one() {\n}\n\nstruct S {\n    a: u8,\n}\n\nimpl S {\n    fn two(&self) {}\n}\n";
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(cut(Lang::Rust, text), [(1, 1, None), (3, 6, name("one")), (8, 10, name("S")), (12, 14, name("S"))]);
    }

    #[test]
    fn large_types_give_their_methods_and_long_functions_give_windows_with_their_head() {
        let method = |n: u32| format!("    def m{n}(self):\n{}", "        x = 1\n".repeat(6));
        let text = format!("class A:\n    y = 1\n{}{}{}", method(1), method(2), method(3));
        let found = cut(Lang::Python, &text);
        assert_eq!(found.iter().map(|u| (u.0, u.1)).collect::<Vec<_>>(), [(1, 2), (3, 9), (10, 16), (17, 23)]);

        let text = format!("fn long(\n    a: u8,\n) {{\n{}}}\n", "    work();\n".repeat(200));
        let defs = extract(Lang::Rust, &text).defs;
        let units = units(Some(Lang::Rust), &defs, &text);
        assert_eq!(
            units.iter().map(|u| (u.start, u.end)).collect::<Vec<_>>(),
            [(1, 50), (51, 100), (101, 150), (151, 204)]
        );
        assert_eq!(units[0].head, None);
        assert_eq!(units[1].head, Some((1, 3)));
    }

    #[test]
    fn every_line_with_a_word_is_in_exactly_one_unit() {
        let rust = include_str!("extract.rs");
        let shared = "fn a() {} fn b() {}\nfn c() {\n} fn d() {\n}\nx\n";
        for text in [rust, shared, "", "\n\n", "}\n{\n"] {
            let units = units(Some(Lang::Rust), &extract(Lang::Rust, text).defs, text);
            for (number, line) in (1u32..).zip(text.lines()) {
                let count = units.iter().filter(|u| (u.start..=u.end).contains(&number)).count();
                assert!(count <= 1, "line {number}: {line}");
                assert!(count == 1 || !line.chars().any(char::is_alphanumeric), "line {number}: {line}");
            }
        }
    }

    #[test]
    fn text_without_a_grammar_is_windows() {
        let text = "word\n".repeat(120);
        let units = units(None, &[], &text);
        assert_eq!(units.iter().map(|u| (u.start, u.end)).collect::<Vec<_>>(), [(1, 50), (51, 100), (101, 120)]);
    }
}
