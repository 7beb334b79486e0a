//! The index over small trees of many languages: what it finds, that its history does not show, and what cannot harm it.

use super::*;
use proptest::prelude::*;
use std::{collections::BTreeMap, fs};

/// A small shop in every language, with tests, documents and things that are no text.
const SHOP: &[(&str, &str)] = &[
    ("src/cart.rs", include_str!("testdata/cart.rs.txt")),
    ("src/retry.rs", include_str!("testdata/retry.rs.txt")),
    (
        "tests/cart.rs",
        "use shop::Cart;\n\n#[test]\nfn cart_total_adds_prices() {\n    let cart = Cart::default();\n    assert_eq!(cart.total_price(), 0);\n}\n",
    ),
    (
        "py/billing.py",
        "TAX_RATE = 0.2\n\nclass Invoice:\n    \"\"\"An invoice for a customer.\"\"\"\n\n    def render_pdf(self, out):\n        out.write(b'%PDF')\n\n\ndef send_invoice(invoice, address):\n    return address\n",
    ),
    (
        "web/api.js",
        "export const fetchOrders = async (page) => {\n  return fetch('/orders?page=' + page);\n};\n\nexport class OrderList {\n  render() { return ''; }\n}\n",
    ),
    (
        "web/types.ts",
        "export interface Customer {\n  name: string;\n}\nexport type OrderId = string;\nexport enum Status { Open, Paid }\n",
    ),
    (
        "web/Button.tsx",
        "export function PayButton(props: { label: string }) {\n  return <button>{props.label}</button>;\n}\n",
    ),
    (
        "go/pool.go",
        "package pool\n\ntype WorkerPool struct {\n\tsize int\n}\n\nfunc (p *WorkerPool) Submit(job func()) error {\n\treturn nil\n}\n",
    ),
    ("java/Ledger.java", "package shop;\n\npublic class Ledger {\n  public void postTransfer(long cents) {\n  }\n}\n"),
    (
        "c/ring.c",
        "#define RING_SIZE 16\n\nstruct ring_buffer { int head; };\n\nint ring_push(struct ring_buffer *r, int v)\n{\n  return v;\n}\n",
    ),
    ("cpp/shape.cpp", "namespace geo {\nclass Polygon {\n public:\n  double area() const { return 0; }\n};\n}\n"),
    ("ruby/mailer.rb", "class Mailer\n  def deliver_later(message)\n    message\n  end\nend\n"),
    (
        "php/Router.php",
        "<?php\nclass Router {\n  public function dispatchRequest($path) {\n    return $path;\n  }\n}\n",
    ),
    ("bin/deploy.sh", "#!/bin/bash\nrollback_release() {\n  echo back\n}\n"),
    ("web/index.html", "<html>\n<body>\n<div id=\"checkout-form\">Pay</div>\n</body>\n</html>\n"),
    ("web/style.css", ".cart-badge {\n  color: red;\n}\n"),
    ("web/package.json", "{\n  \"name\": \"shop\",\n  \"scripts\": { \"bundle\": \"x\" }\n}\n"),
    (".github/workflows/ci.yml", "name: ci\njobs:\n  lint_all:\n    steps: []\n"),
    ("docs/guide.md", "# Guide\n\nHow to add a cart.\n\n## Rate limits\n\nThe retry policy waits between attempts.\n"),
    ("Cargo.toml", "[package]\nname = \"shop\"\nedition = \"2024\"\n"),
];

fn write(root: &Path, path: &str, text: impl AsRef<[u8]>) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn shop() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in SHOP {
        write(root.path(), path, text);
    }
    root
}

/// A new index over a tree; the folder goes with the guard.
fn fresh(root: &Path) -> (Index, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let index = Index::open(dir.path()).unwrap();
    index.update(root).unwrap();
    (index, dir)
}

fn paths(hits: &[Hit]) -> Vec<&str> {
    hits.iter().map(|hit| hit.path.as_str()).collect()
}

/// Everything that an index says, as text.
fn answers(index: &Index) -> String {
    let mut out = String::new();
    for query in [
        "cart total price",
        "retry",
        "where is Invoice defined",
        "tests of the cart",
        "word0 word3 item_7",
        "src/cart.rs",
        "x",
    ] {
        out.push_str(&format!("{query}: {:#?}\n", index.search(query, 20).unwrap()));
        for budget in [60, 400, 3000] {
            out.push_str(&format!("{:#?}\n", index.pack(query, budget).unwrap()));
        }
    }
    for name in ["Cart", "cart", "item", "word", "f"] {
        out.push_str(&format!("{name}: {:#?}\n", index.symbols(name, 30).unwrap()));
    }
    out.push_str(&index.map(400).unwrap());
    let Status { files, units, symbols, segments: _ } = index.status();
    out.push_str(&format!("{files} {units} {symbols}"));
    out
}

#[track_caller]
fn assert_as_fresh(index: &Index, root: &Path) {
    let (other, _dir) = fresh(root);
    let (have, expected) = (answers(index), answers(&other));
    if have != expected {
        let at = have.lines().zip(expected.lines()).position(|(a, b)| a != b).unwrap_or(0);
        let near = |text: &str| text.lines().skip(at.saturating_sub(15)).take(25).collect::<Vec<_>>().join("\n");
        panic!("not as a fresh index, from line {at}:\n{}\n--- fresh:\n{}", near(&have), near(&expected));
    }
}

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
fn a_deleted_path_is_in_no_answer() {
    let root = shop();
    let (index, _dir) = fresh(root.path());
    assert!(answers(&index).contains("src/cart.rs"));
    fs::remove_file(root.path().join("src/cart.rs")).unwrap();
    let report = index.update(root.path()).unwrap();
    assert_eq!((report.files, report.added, report.changed, report.removed), (SHOP.len() - 1, 0, 0, 1));
    assert!(!answers(&index).replace("\nsrc/cart.rs: ", "").contains("src/cart.rs"));
    assert_as_fresh(&index, root.path());
}

#[test]
fn what_did_not_change_costs_nothing() {
    let root = shop();
    let (index, dir) = fresh(root.path());
    let before = fs::metadata(dir.path().join("text/meta.json")).unwrap().modified().unwrap();
    // The same text under a new stamp is read, and no more.
    write(root.path(), SHOP[0].0, SHOP[0].1);
    let report = index.update(root.path()).unwrap();
    assert_eq!((report.files, report.added, report.changed, report.removed), (SHOP.len(), 0, 0, 0));
    assert_eq!(fs::metadata(dir.path().join("text/meta.json")).unwrap().modified().unwrap(), before);
    // The same length at once is seen all the same.
    let text = SHOP[0].1.replace("total_price", "total_money");
    write(root.path(), SHOP[0].0, &text);
    assert_eq!(index.update(root.path()).unwrap().changed, 1);
    assert_eq!(index.symbols("total_money", 1).unwrap().len(), 1);
    // Another process finds all of it there.
    drop(index);
    let index = Index::open(dir.path()).unwrap();
    assert_as_fresh(&index, root.path());
    let report = index.update(root.path()).unwrap();
    assert_eq!((report.added, report.changed, report.removed), (0, 0, 0));
}

/// A step of a tree's life. Numbers choose among what there is.
#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize),
    Delete(usize),
    Rename(usize, usize),
    Binary(usize),
    Update,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..12, 0usize..40).prop_map(|(file, text)| Step::Write(file, text)),
        2 => (0usize..12).prop_map(Step::Delete),
        2 => (0usize..12, 0usize..12).prop_map(|(from, to)| Step::Rename(from, to)),
        1 => (0usize..12).prop_map(Step::Binary),
        5 => Just(Step::Update),
        1 => Just(Step::Reopen),
    ]
}

fn name(number: usize) -> String {
    let folder = ["src", "tests", "lib/deep", "docs"][number % 4];
    let suffix = ["rs", "py", "md", "txt", "json"][number % 5];
    format!("{folder}/file{number}.{suffix}")
}

fn text(number: usize) -> String {
    let body: String =
        (0..number % 7).map(|line| format!("    word{line} = retry(word{}, cart)\n", number % 5)).collect();
    match number % 4 {
        0 => format!("fn item_{number}() {{\n{body}}}\nstruct Cart{number};\n"),
        1 => format!("def item_{number}(cart):\n{body}    return 1\n\nclass Cart:\n    total = 1\n"),
        2 => format!("# Item {number}\n\n{body}\n"),
        _ => body,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 10, ..ProptestConfig::default() })]

    #[test]
    fn any_history_ends_as_a_fresh_index(steps in proptest::collection::vec(step(), 1..40)) {
        let root = tempfile::tempdir().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut index = Index::open(dir.path()).unwrap();
        for step in steps {
            let at = |number| root.path().join(name(number));
            match step {
                Step::Write(file, number) => write(root.path(), &name(file), text(number)),
                Step::Delete(file) => drop(fs::remove_file(at(file))),
                Step::Rename(from, to) => {
                    fs::create_dir_all(at(to).parent().unwrap()).unwrap();
                    drop(fs::rename(at(from), at(to)));
                }
                Step::Binary(file) => write(root.path(), &name(file), b"a\0b"),
                Step::Update => drop(index.update(root.path()).unwrap()),
                Step::Reopen => {
                    drop(index);
                    index = Index::open(dir.path()).unwrap();
                }
            }
        }
        index.update(root.path()).unwrap();
        assert_as_fresh(&index, root.path());
    }
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
    // Of all, the one that others use comes first.
    assert!(map.starts_with("src/cart.rs:\n"), "{map}");
}

#[test]
fn equal_files_give_equal_bytes() {
    let root = shop();
    let (one, dir) = fresh(root.path());
    let (other, _dir) = fresh(root.path());
    assert_eq!(answers(&one), answers(&other));
    assert_eq!(answers(&one), answers(&one));
    drop(one);
    assert_eq!(answers(&Index::open(dir.path()).unwrap()), answers(&other));
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

#[test]
fn a_damaged_folder_heals() {
    let root = shop();
    let (index, dir) = fresh(root.path());
    let expected = answers(&index);
    drop(index);
    let folder = dir.path().join("text");
    let files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() > 5);
    let heals = |what: &str| {
        let index = Index::open(dir.path()).unwrap_or_else(|error| panic!("{what}: {error}"));
        index.update(root.path()).unwrap();
        assert_eq!(answers(&index), expected, "{what}");
    };
    let harms: [(&str, fn(&Path)); 4] = [
        ("deleted", |path| fs::remove_file(path).unwrap()),
        ("emptied", |path| fs::write(path, "").unwrap()),
        ("cut", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
        }),
        ("flipped", |path| {
            let mut bytes = fs::read(path).unwrap();
            let middle = bytes.len() / 2;
            if let Some(byte) = bytes.get_mut(middle) {
                *byte ^= 0x10;
            }
            fs::write(path, bytes).unwrap();
        }),
    ];
    for (harm, do_it) in harms {
        // Names change when an index is built anew, so the kinds of file are gone through.
        for kind in ["meta.json", ".managed.json", "store", "term", "idx", "fast", "fieldnorm", ".tantivy-writer.lock"]
        {
            let file = fs::read_dir(&folder)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .find(|path| path.to_str().unwrap().ends_with(kind));
            if let Some(file) = file {
                do_it(&file);
                heals(&format!("{kind} {harm}"));
            }
        }
    }
    fs::remove_dir_all(&folder).unwrap();
    heals("no folder");
    fs::remove_dir_all(&folder).unwrap();
    fs::write(&folder, "a file").unwrap();
    heals("a file in its place");
    let meta = fs::read_to_string(folder.join("meta.json")).unwrap();
    fs::write(folder.join("meta.json"), meta.replace("loopwright-index-", "loopwright-index-0")).unwrap();
    heals("another format");
    // A folder that goes away or breaks under an open index.
    let index = Index::open(dir.path()).unwrap();
    fs::remove_dir_all(dir.path()).unwrap();
    index.update(root.path()).unwrap();
    assert_eq!(answers(&index), expected);
    heals("deleted while open");
}

#[test]
fn a_half_written_update_is_not_seen_and_heals() {
    let root = shop();
    let (index, dir) = fresh(root.path());
    let before = answers(&index);
    // What a process leaves that dies between its writes and its commit: a copy of the folder at that moment.
    let loaded = index.loaded();
    let change = loaded.change(1).unwrap();
    let (path, record) = loaded.catalog.files.iter().next().unwrap();
    change.remove(record.id);
    change
        .add(&catalog::Record { id: 999, path: format!("{path}.new"), ..record.clone() }, "half written words")
        .unwrap();
    let copy = tempfile::tempdir().unwrap();
    fs::create_dir_all(copy.path().join("text")).unwrap();
    for entry in fs::read_dir(dir.path().join("text")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join("text").join(entry.file_name())).unwrap();
    }
    fs::write(copy.path().join("text/0123456789abcdef0123456789abcdef.store"), "half").unwrap();
    drop(change);
    drop(loaded);
    let copied = Index::open(copy.path()).unwrap();
    assert_eq!(answers(&copied), before);
    write(root.path(), "src/new.rs", "fn word3() {}\n");
    copied.update(root.path()).unwrap();
    assert_as_fresh(&copied, root.path());
    // And here, where it was dropped.
    index.update(root.path()).unwrap();
    assert_as_fresh(&index, root.path());
}

#[test]
fn two_processes_do_not_double_a_file() {
    let root = shop();
    let (one, dir) = fresh(root.path());
    let two = Index::open(dir.path()).unwrap();
    write(root.path(), "src/new.rs", "fn word3() {}\n");
    one.update(root.path()).unwrap();
    // The other one has the old state and sees the same change.
    assert_eq!(two.update(root.path()).unwrap().added, 0);
    assert_as_fresh(&two, root.path());
    write(root.path(), "src/newer.rs", "fn word4() {}\n");
    let loaded = one.loaded();
    let change = loaded.change(1).unwrap();
    assert_eq!(two.update(root.path()).unwrap_err().code(), "index.busy");
    drop(change);
    drop(loaded);
    assert_eq!(two.update(root.path()).unwrap().added, 1);
    one.update(root.path()).unwrap();
    assert_as_fresh(&one, root.path());
}

#[test]
fn a_root_that_cannot_be_read_changes_nothing() {
    let root = shop();
    let (index, _dir) = fresh(root.path());
    let before = answers(&index);
    assert_eq!(index.update(&root.path().join("none")).unwrap_err().code(), "index.disk");
    assert_eq!(answers(&index), before);
    let file = root.path().join("Cargo.toml");
    assert_eq!(Index::open(&file).err().unwrap().code(), "index.disk");
    let full: IndexError = tantivy::TantivyError::InternalError("x".into()).into();
    assert_eq!(full.code(), "index.full_text");
}

#[test]
fn many_small_updates_leave_few_segments() {
    let root = shop();
    let (index, _dir) = fresh(root.path());
    for number in 0..40 {
        write(root.path(), "src/often.rs", text(number * 4));
        assert_eq!(index.update(root.path()).unwrap().files, SHOP.len() + 1);
    }
    assert!(index.status().segments <= 12, "{:?}", index.status());
    assert_as_fresh(&index, root.path());
}

#[test]
fn it_is_asked_by_many_threads_while_it_is_updated() {
    fn shared<T: Send + Sync>(_: &T) {}
    let root = shop();
    let (index, _dir) = fresh(root.path());
    shared(&index);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..20 {
                    // From before or after an update, never in between: the file is there in full.
                    let hits = index.search("where is total_price", 3).unwrap();
                    assert_eq!(hits[0].symbol.as_deref(), Some("total_price"));
                    assert!(index.pack("total_price", 500).unwrap().text.contains("pub fn total_price"));
                }
            });
        }
        for number in 0..5 {
            write(root.path(), "src/cart.rs", format!("{}// {number}\n", SHOP[0].1));
            index.update(root.path()).unwrap();
        }
    });
    assert_as_fresh(&index, root.path());
}

#[test]
fn measure() {
    let Ok(root) = std::env::var("MEASURE") else { return };
    let root = Path::new(&root);
    let bytes: u64 =
        walk::walk(root).unwrap().files.iter().map(|f| f.stamp.bytes).filter(|b| *b <= walk::FILE_BYTES_MAX).sum();
    let start = std::time::Instant::now();
    for lang in lang::ALL {
        lang.grammar();
    }
    println!("queries {:?}", start.elapsed());
    let start = std::time::Instant::now();
    let mut n = 0;
    for seen in walk::walk(root).unwrap().files {
        if let walk::Content::Text(text) = walk::read(root, &seen)
            && let Some(lang) = lang::Lang::of(&seen.path, &text)
        {
            let s = std::time::Instant::now();
            n += extract::extract(lang, &text).defs.len();
            if s.elapsed().as_millis() > 400 {
                println!("slow {} {:?} {}", seen.path, s.elapsed(), text.len());
            }
        }
    }
    println!("extraction {n} {:?}", start.elapsed());
    let dir = tempfile::tempdir().unwrap();
    let index = Index::open(dir.path()).unwrap();
    let start = std::time::Instant::now();
    let report = index.update(root).unwrap();
    let took = start.elapsed().as_secs_f64();
    println!(
        "{} files {:.2} MB in {took:.2} s: {:.2} MB/s",
        report.files,
        bytes as f64 / 1e6,
        bytes as f64 / 1e6 / took
    );
    for s in report.skipped.iter().take(30) {
        println!("skipped {s:?}");
    }
    let size: u64 = fs::read_dir(dir.path().join("text")).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
    for e in fs::read_dir(dir.path().join("text")).unwrap() {
        let e = e.unwrap();
        println!("{:?} {}", e.file_name(), e.metadata().unwrap().len());
    }
    println!("index {:.2} x {:?}", size as f64 / bytes as f64, index.status());
    let start = std::time::Instant::now();
    index.update(root).unwrap();
    println!("no change {:?}", start.elapsed());
    for query in std::env::var("ASK").unwrap_or_default().split('|') {
        let start = std::time::Instant::now();
        let hits = index.search(query, 8).unwrap();
        println!("== {query} {:?}", start.elapsed());
        for h in hits {
            println!("{}:{}-{} {:?} [{}]", h.path, h.start_line, h.end_line, h.symbol, h.why);
        }
        let start = std::time::Instant::now();
        let pack = index.pack(query, 8000).unwrap();
        println!("pack {:?} {} tokens", start.elapsed(), pack.tokens);
        for i in pack.items.iter() {
            println!("   {}:{}-{} {:?} {}", i.path, i.start_line, i.end_line, i.symbol, i.tokens);
        }
    }
    let start = std::time::Instant::now();
    let map = index.map(1500).unwrap();
    println!("map {:?}\n{map}", start.elapsed());
}
