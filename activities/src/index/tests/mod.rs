//! The index over small trees of many languages: what it finds, that its history does not show, and what cannot harm it.

mod answers;
mod history;

use super::*;
use std::fs;

/// A small shop in every language, with tests, documents and things that are no text.
const SHOP: &[(&str, &str)] = &[
    ("src/cart.rs", include_str!("../testdata/cart.rs.txt")),
    ("src/retry.rs", include_str!("../testdata/retry.rs.txt")),
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
