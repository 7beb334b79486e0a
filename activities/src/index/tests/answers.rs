//! What it finds, in what order and within what size.

use super::*;
use std::collections::BTreeMap;

#[test]
fn definitions_of_every_language_are_found() {
    let root = shop();
    let (index, _dir) = fresh(root.path());
    for (name, kind, path, line, parent) in [
        ("Cart", "struct", "src/cart.rs", 4, None),
        ("total_price", "method", "src/cart.rs", 15, Some("Cart")),
        ("Invoice", "class", "py/billing.py", 3, None),
        ("render_pdf", "method", "py/billing.py", 6, Some("Invoice")),
        ("TAX_RATE", "variable", "py/billing.py", 1, None),
        ("fetchOrders", "function", "web/api.js", 1, None),
        ("OrderList", "class", "web/api.js", 5, None),
        ("Customer", "interface", "web/types.ts", 1, None),
        ("PayButton", "function", "web/Button.tsx", 1, None),
        ("Submit", "method", "go/pool.go", 7, Some("WorkerPool")),
        ("postTransfer", "method", "java/Ledger.java", 4, Some("Ledger")),
        ("ring_push", "function", "c/ring.c", 5, None),
        ("Polygon", "class", "cpp/shape.cpp", 2, Some("geo")),
        ("deliver_later", "method", "ruby/mailer.rb", 2, Some("Mailer")),
        ("dispatchRequest", "method", "php/Router.php", 3, Some("Router")),
        ("rollback_release", "function", "bin/deploy.sh", 2, None),
        ("checkout-form", "id", "web/index.html", 3, None),
        ("cart-badge", "class", "web/style.css", 1, None),
        ("bundle", "key", "web/package.json", 3, Some("scripts")),
        ("lint_all", "key", ".github/workflows/ci.yml", 3, Some("jobs")),
        ("Rate limits", "section", "docs/guide.md", 5, Some("Guide")),
    ] {
        let found = index.symbols(name, 5).unwrap();
        let first = found.first().unwrap_or_else(|| panic!("{name} is not found"));
        let told =
            (first.name.as_str(), first.kind.as_str(), first.path.as_str(), first.start_line, first.parent.as_deref());
        assert_eq!(told, (name, kind, path, line, parent));
    }
    assert_eq!(index.symbols("fetchOrders", 5).unwrap()[0].signature, "export const fetchOrders = async (page) =>");
}

#[test]
fn symbols_fit_exactly_then_in_any_case_then_in_part() {
    let root = tempfile::tempdir().unwrap();
    write(
        root.path(),
        "a.rs",
        "fn open() {}\nfn Open() {}\nfn open_file() {}\nfn reopen() {}\nstruct Pool;\nimpl Pool { fn open(&self) {} }\n",
    );
    write(root.path(), "tests/a.rs", "fn open() {}\n");
    let (index, _dir) = fresh(root.path());
    let told = |name: &str| {
        let symbols = index.symbols(name, 10).unwrap();
        symbols.into_iter().map(|s| format!("{} {}:{}", s.name, s.path, s.start_line)).collect::<Vec<_>>()
    };
    assert_eq!(told("open"), ["open a.rs:1", "open a.rs:6", "open tests/a.rs:1", "Open a.rs:2", "open_file a.rs:3"]);
    assert_eq!(told("Pool::open"), ["open a.rs:6"]);
    assert_eq!(told("OPEN_FILE"), ["open_file a.rs:3"]);
    assert_eq!(told("eope"), ["reopen a.rs:4"]);
    assert_eq!(told("Nowhere::open")[0], "open a.rs:1");
    assert!(told("").is_empty() && told("zz").is_empty() && told("::").is_empty());
}

#[test]
fn plain_questions_find_their_file_first() {
    let root = shop();
    let (index, _dir) = fresh(root.path());
    for (query, path) in [
        ("add up the prices of a cart", "src/cart.rs"),
        ("exponential backoff between attempts", "src/retry.rs"),
        ("where is Invoice defined", "py/billing.py"),
        ("tests for the cart total", "tests/cart.rs"),
        ("documentation about rate limits", "docs/guide.md"),
        ("ring buffer push", "c/ring.c"),
        ("HTTP request dispatch router", "php/Router.php"),
        ("total price", "src/cart.rs"),
        ("worker pool submit", "go/pool.go"),
        ("order list", "web/api.js"),
        ("go/pool.go", "go/pool.go"),
        ("change billing.py", "py/billing.py"),
        ("cart-badge color", "web/style.css"),
        ("ci workflow", ".github/workflows/ci.yml"),
    ] {
        let hits = index.search(query, 5).unwrap();
        assert_eq!(paths(&hits).first(), Some(&path), "{query}: {hits:#?}");
    }
    let hit = &index.search("where is total_price", 1).unwrap()[0];
    assert_eq!((hit.symbol.as_deref(), hit.start_line), (Some("total_price"), 15));
    assert!(hit.why.contains("file ") && hit.why.contains("symbol 1"), "{}", hit.why);
    assert!(hit.snippet.starts_with("    pub fn total_price"), "{}", hit.snippet);
}

#[test]
fn no_budget_is_exceeded() {
    let root = shop();
    // Something large to ask for.
    write(
        root.path(),
        "src/large.rs",
        format!("pub fn large_one() {{\n{}}}\n", "    let cart = price + total;\n".repeat(400)),
    );
    let (index, _dir) = fresh(root.path());
    for budget in (0..60).chain((60..400).step_by(13)).chain((400..9000).step_by(931)) {
        let map = index.map(budget).unwrap();
        assert!(budget::tokens(map.len()) <= budget, "map of {budget}: {}", map.len());
        for query in ["cart total price", "where is large_one", "retry `Cart` Invoice WorkerPool", "src/cart.rs", "zzz"]
        {
            let pack = index.pack(query, budget).unwrap();
            assert!(
                pack.tokens <= budget && pack.tokens == budget::tokens(pack.text.len()),
                "{query} {budget}: {}",
                pack.tokens
            );
            assert!(pack.items.iter().map(|item| item.tokens).sum::<usize>() < pack.tokens + pack.items.len() + 1);
        }
    }
    assert_eq!(index.pack("cart", 0).unwrap().text, "");
    assert_eq!(index.map(0).unwrap(), "");
}

#[test]
fn a_pack_holds_what_was_asked_for_first_and_names_what_did_not_fit() {
    let root = shop();
    let (index, _dir) = fresh(root.path());
    let query = "why does send_invoice fail for a cart";
    let pack = index.pack(query, 60).unwrap();
    assert!(
        pack.text.starts_with("### py/billing.py:10-11 send_invoice\ndef send_invoice(invoice, address):\n"),
        "{}",
        pack.text
    );
    assert_eq!(pack.items[0].symbol.as_deref(), Some("send_invoice"));
    let pack = index.pack(query, 500).unwrap();
    assert_eq!(pack.items[0].path, "py/billing.py");
    // A whole file, down to the bracket that no unit holds.
    assert!(pack.text.contains("        self.items.clear();\n    }\n}\n\n"), "{}", pack.text);
    let small = index.pack("cart total price", 90).unwrap();
    assert!(!small.items.is_empty() && !small.omitted.is_empty(), "{small:#?}");
    // All of a small project fits, and nothing of it twice.
    let all = index.pack("cart", 4000).unwrap();
    assert_eq!(all.text.matches("pub fn total_price").count(), 1);
    // A unit over its share: head and the lines that are asked for.
    let middle = "    let other = 1;\n".repeat(60) + "    needle_in_hay(price);\n" + &"    let other = 2;\n".repeat(60);
    write(root.path(), "src/hay.rs", format!("pub fn haystack(price: u8) {{\n{middle}}}\n"));
    index.update(root.path()).unwrap();
    let pack = index.pack("hay needle", 300).unwrap();
    assert!(pack.text.contains("pub fn haystack(price: u8)") && pack.text.contains("needle_in_hay"), "{}", pack.text);
}

#[test]
fn a_map_shows_what_is_used_under_its_file_and_parent() {
    let root = shop();
    let (index, _dir) = fresh(root.path());
    let map = index.map(2000).unwrap();
    assert!(map.contains("src/cart.rs:\n  pub struct Cart\n"), "{map}");
    assert!(map.contains("py/billing.py:\n  class Invoice:\n    def render_pdf(self, out):\n"), "{map}");
    assert!(!map.contains("docs/guide.md") && !map.contains("Rate limits"), "{map}");
    assert!(map.contains("  impl Cart\n    pub fn total_price(&self) -> u64\n"), "{map}");
    // Of all, the one that others use comes first.
    assert!(map.starts_with("src/cart.rs:\n"), "{map}");
}

#[test]
fn garbage_does_no_harm_and_is_found_by_path() {
    let root = shop();
    let root = root.path();
    write(root, "assets/logo.png", b"\x89PNG\0\0cart");
    write(root, "assets/huge_dump.sql", "insert into cart;\n".repeat(70_000));
    write(root, "assets/minified.js", format!("var cart='{}'", "x".repeat(9000)));
    write(root, "src/broken.rs", "fn good_one() {}\nfn (((( {{{{ cart\nstruct\n");
    write(root, "src/deep.json", "[".repeat(7000));
    write(root, "src/deep.yaml", "- ".repeat(3000));
    write(root, "src/latin.py", b"def caf\xe9():\n    pass\n");
    write(root, "src/empty.rs", "");
    write(root, "src/newlines.rs", "\n\n\n");
    write(root, "src/no-end.rs", "fn last_one() {}");
    write(root, "src/crlf.rs", "fn crlf_one() {\r\n}\r\n");
    write(root, "src/bom.rs", "\u{feff}fn bom_one() {}\n");
    write(root, "src/marks ### ` $(x).rs", "fn odd_one() {}\n");
    let (index, _dir) = fresh(root);
    let report = index.update(root).unwrap();
    let skipped: BTreeMap<_, _> = report.skipped.iter().cloned().collect();
    for (path, why) in [
        ("assets/logo.png", "binary"),
        ("assets/huge_dump.sql", "larger than 1 MB"),
        ("assets/minified.js", "lines of more than 8000 bytes"),
        ("src/deep.yaml", "nested too deeply for the grammar; full text only"),
    ] {
        assert_eq!(skipped.get(path).map(String::as_str), Some(why), "{skipped:?}");
        assert_eq!(paths(&index.search(path, 1).unwrap()), [path]);
    }
    for name in ["good_one", "last_one", "crlf_one", "bom_one", "odd_one"] {
        assert_eq!(index.symbols(name, 1).unwrap().len(), 1, "{name}");
    }
    assert_as_fresh(&index, root);
    for query in ["", " ", "\0", "AND OR NOT", "body:(", "\"", "*", "ü", &"cart ".repeat(9000)] {
        index.search(query, 5).unwrap();
        index.pack(query, 500).unwrap();
        index.symbols(query, 5).unwrap();
    }
    assert!(index.search("cart", 0).unwrap().is_empty());
}
