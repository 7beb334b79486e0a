use super::*;
use crate::index::lang::ALL;
use proptest::prelude::*;

/// `kind name@start-end <parent` of every definition.
fn told(lang: Lang, text: &str) -> Vec<String> {
    extract(lang, text)
        .defs
        .iter()
        .map(|d| {
            let parent = d.parent.as_ref().map(|p| format!(" <{p}")).unwrap_or_default();
            format!("{} {}@{}-{}{parent}", d.kind, d.name, d.start, d.end)
        })
        .collect()
}

#[track_caller]
fn check(lang: Lang, text: &str, expected: &[&str]) {
    assert_eq!(told(lang, text), expected, "{lang:?}");
}

#[test]
fn rust() {
    check(
        Lang::Rust,
        "pub struct Pool<T> {\n    a: T,\n}\n\nimpl<T> Pool<T> {\n    pub fn open(&self) -> u8 {\n        1\n    }\n}\n\
         enum E { A, B(u8) }\ntrait Shape { fn area(&self) -> f64; }\ntype Id = u64;\nconst MAX: usize = 1;\n\
         static ONE: u8 = 1;\nmacro_rules! say { () => {} }\nmod deep { fn inner() {} }\nmod other;\nunion U { a: u8 }\n",
        &[
            "struct Pool@1-3",
            "impl Pool@5-9",
            "method open@6-8 <Pool",
            "enum E@10-10",
            "variant A@10-10 <E",
            "variant B@10-10 <E",
            "trait Shape@11-11",
            "method area@11-11 <Shape",
            "type Id@12-12",
            "const MAX@13-13",
            "static ONE@14-14",
            "macro say@15-15",
            "module deep@16-16",
            "function inner@16-16 <deep",
            "union U@18-18",
        ],
    );
}

#[test]
fn rust_items_in_macros() {
    check(
        Lang::Rust,
        "cfg_rt! {\n    pub fn spawn() {}\n    cfg_io! {\n        fn deep() {}\n    }\n}\nimpl A {\n    cfg_x! {\n        fn m(&self) {}\n    }\n}\n\
         lazy! { static ref X: u8 = 1; }\n",
        &["function spawn@2-2", "function deep@4-4", "impl A@7-11", "method m@9-9 <A", "static X@12-12"],
    );
}

#[test]
fn python() {
    check(
        Lang::Python,
        "LIMIT = 3\n\nclass Cart(Base):\n    @property\n    def total(self):\n        def add(x):\n            return x\n        return 1\n\n\
         async def main():\n    pass\n",
        &[
            "variable LIMIT@1-1",
            "class Cart@3-8",
            "method total@5-8 <Cart",
            "function add@6-7 <total",
            "function main@10-11",
        ],
    );
}

#[test]
fn javascript() {
    check(
        Lang::JavaScript,
        "export const limit = 3;\nexport const load = async (id) => {\n  return id;\n};\nfunction go() {}\nclass Cart {\n  total() { return 1; }\n  #add = (x) => x;\n}\n\
         module.exports.run = function () {};\nconst api = { fetchAll: () => 1 };\nfunction* many() {}\nvar old = 1;\n",
        &[
            "const limit@1-1",
            "function load@2-4",
            "function go@5-5",
            "class Cart@6-9",
            "method total@7-7 <Cart",
            "method #add@8-8 <Cart",
            "function run@10-10",
            "const api@11-11",
            "function fetchAll@11-11 <api",
            "function many@12-12",
            "variable old@13-13",
        ],
    );
}

#[test]
fn typescript_and_tsx() {
    let text = "export interface Shape {\n  area(): number;\n}\ntype Id = string;\nenum Color { Red }\nnamespace Deep { export function inner() {} }\n\
        abstract class Base<T> {\n  abstract run(): void;\n  stop = (): void => {};\n}\nexport default function main(a: number): void {}\nconst useIt = () => 1;\n";
    let expected = [
        "interface Shape@1-3",
        "method area@2-2 <Shape",
        "type Id@4-4",
        "enum Color@5-5",
        "module Deep@6-6",
        "function inner@6-6 <Deep",
        "class Base@7-10",
        "method run@8-8 <Base",
        "method stop@9-9 <Base",
        "function main@11-11",
        "function useIt@12-12",
    ];
    check(Lang::TypeScript, text, &expected);
    check(Lang::Tsx, text, &expected);
    check(
        Lang::Tsx,
        "export const Button = ({ label }: Props) => {\n  return <b className=\"x\">{label}</b>;\n};\n",
        &["function Button@1-3"],
    );
}

#[test]
fn go() {
    check(
        Lang::Go,
        "package a\n\nconst Max = 1\n\nvar (\n\tErr = 2\n)\n\ntype Pool struct {\n\tn int\n}\n\ntype Shape interface {\n\tArea() int\n}\n\ntype ID string\n\n\
         func (p *Pool) Open() error {\n\treturn nil\n}\n\nfunc Main() {}\n",
        &[
            "const Max@3-3",
            "variable Err@6-6",
            "struct Pool@9-11",
            "interface Shape@13-15",
            "method Area@14-14 <Shape",
            "type ID@17-17",
            "method Open@19-21 <Pool",
            "function Main@23-23",
        ],
    );
}

#[test]
fn java() {
    check(
        Lang::Java,
        "package a;\npublic class Cart {\n  private int n = 1;\n  public Cart() {}\n  public int total(int x) {\n    return n;\n  }\n  enum Color { RED }\n  record P(int x) {}\n}\ninterface Shape { double area(); }\n@interface Mark {}\n",
        &[
            "class Cart@2-10",
            "field n@3-3 <Cart",
            "constructor Cart@4-4 <Cart",
            "method total@5-7 <Cart",
            "enum Color@8-8 <Cart",
            "variant RED@8-8 <Color",
            "record P@9-9 <Cart",
            "interface Shape@11-11",
            "method area@11-11 <Shape",
            "annotation Mark@12-12",
        ],
    );
}

#[test]
fn c() {
    check(
        Lang::C,
        "#define MAX 1\n#define SQ(x) ((x)*(x))\nstruct pool { int n; };\nenum color { RED };\ntypedef unsigned long id_t;\nint area(int a);\n\
         static char *name_of(struct pool *p)\n{\n  return 0;\n}\n#if A\nint one(void) { return 1; }\n#else\nint two(void) { return 2; }\n#endif\nint count = 0;\n",
        &[
            "macro MAX@1-1",
            "macro SQ@2-2",
            "struct pool@3-3",
            "enum color@4-4",
            "variant RED@4-4 <color",
            "type id_t@5-5",
            "prototype area@6-6",
            "function name_of@7-10",
            "function one@12-12",
            "function two@14-14",
            "variable count@16-16",
        ],
    );
}

#[test]
fn cpp() {
    check(
        Lang::Cpp,
        "namespace geo {\nclass Shape {\n public:\n  virtual double area() const = 0;\n  int id() { return 1; }\n};\ntemplate <class T>\nT largest(T a, T b) { return a; }\n}\n\
         double geo::Shape::area() const {\n  return 1;\n}\nShape& self() {}\nusing Id = int;\nShape::~Shape() {}\n",
        &[
            "namespace geo@1-9",
            "class Shape@2-6 <geo",
            "prototype area@4-4 <Shape",
            "method id@5-5 <Shape",
            "function largest@8-8 <geo",
            "method area@10-12 <geo::Shape",
            "function self@13-13",
            "type Id@14-14",
            "method ~Shape@15-15 <Shape",
        ],
    );
}

#[test]
fn ruby() {
    check(
        Lang::Ruby,
        "module Shop\n  LIMIT = 3\n  class Cart < Base\n    def total\n      1\n    end\n    def self.open(a)\n    end\n    alias sum total\n  end\nend\n",
        &[
            "module Shop@1-11",
            "const LIMIT@2-2 <Shop",
            "class Cart@3-10 <Shop",
            "method total@4-6 <Cart",
            "method open@7-8 <Cart",
            "method sum@9-9 <Cart",
        ],
    );
}

#[test]
fn php() {
    check(
        Lang::Php,
        "<?php\nnamespace Shop;\nconst MAX = 3;\nclass Cart extends Base {\n  private int $n = 1;\n  const TWO = 2;\n  public function total(): int {\n    return 1;\n  }\n}\n\
         interface Shape { function area(); }\ntrait Logs {}\nenum Color { case Red; }\nfunction main() {}\n",
        &[
            "const MAX@3-3",
            "class Cart@4-10",
            "field n@5-5 <Cart",
            "const TWO@6-6 <Cart",
            "method total@7-9 <Cart",
            "interface Shape@11-11",
            "method area@11-11 <Shape",
            "trait Logs@12-12",
            "enum Color@13-13",
            "variant Red@13-13 <Color",
            "function main@14-14",
        ],
    );
}

#[test]
fn bash() {
    check(
        Lang::Bash,
        "#!/bin/bash\nROOT=/tmp\nexport NAME=x\nbuild() {\n  local y=1\n}\nfunction clean {\n  rm x\n}\n",
        &["variable ROOT@2-2", "variable NAME@3-3", "function build@4-6", "function clean@7-9"],
    );
}

#[test]
fn html_css_json_yaml_markdown() {
    check(
        Lang::Html,
        "<div id=\"cart\">\n <p class=\"x\" id=\"total\">1</p>\n</div>\n",
        &["id cart@1-3", "id total@2-2 <cart"],
    );
    check(
        Lang::Css,
        ":root { --main: red; }\n.btn-primary {\n  color: red;\n}\n#cart .line:hover { x: y; }\n@keyframes spin { from {} }\n",
        &["variable --main@1-1", "class btn-primary@2-4", "id cart@5-5", "class line@5-5", "keyframes spin@6-6"],
    );
    check(
        Lang::Json,
        "{\n  \"name\": \"x\",\n  \"scripts\": {\n    \"build\": \"tsc\"\n  }\n}\n",
        &["key name@2-2", "key scripts@3-5", "key build@4-4 <scripts"],
    );
    check(
        Lang::Yaml,
        "name: x\njobs:\n  build:\n    steps: []\n  \"test\": 1\n",
        &["key name@1-1", "key jobs@2-5", "key build@3-4 <jobs", "key test@5-5 <jobs"],
    );
    check(
        Lang::Markdown,
        "# Title\n\ntext\n\n## Install\n\nmore\n\n```sh\n# no heading\n```\n\nUnder\n-----\n\nend\n",
        &["section Title@1-16", "section Install@5-16 <Title", "section Under@13-14 <Install"],
    );
}

#[test]
fn signatures_are_one_line_without_the_body() {
    let signature = |lang, text: &str, name: &str| {
        extract(lang, text).defs.into_iter().find(|def| def.name == name).map(|def| def.signature).unwrap()
    };
    assert_eq!(
        signature(
            Lang::Rust,
            "pub async fn open<T>(\n    a: u8,\n    b: T,\n) -> u8\nwhere\n    T: X,\n{\n    1\n}\n",
            "open"
        ),
        "pub async fn open<T>( a: u8, b: T, ) -> u8 where T: X,"
    );
    assert_eq!(
        signature(Lang::JavaScript, "export const load = async (id) => {\n  1\n};\n", "load"),
        "export const load = async (id) =>"
    );
    assert_eq!(signature(Lang::Python, "class A:\n    def f(self, x=1):\n        pass\n", "f"), "def f(self, x=1):");
    assert_eq!(signature(Lang::Go, "package a\ntype Pool struct {\n\tn int\n}\n", "Pool"), "type Pool");
    assert_eq!(signature(Lang::Rust, "const A: &[u8] = &[\n    1,\n];\n", "A"), "const A: &[u8] = &[");
}

#[test]
fn broken_text_keeps_what_can_be_read() {
    check(
        Lang::Rust,
        "fn good() {}\nfn bad( {\nfn other() {}\nstruct S { a: u8 }\n",
        &["function good@1-1", "function other@3-3", "struct S@4-4"],
    );
    assert!(
        told(Lang::Python, "def a():\n  pass\n\ndef b(:\n  x = (\n\ndef c():\n  pass\n")
            .contains(&"function a@1-2".to_owned())
    );
}

#[test]
fn time_is_bounded() {
    let text = "fn a() { b(); }\n".repeat(6_000);
    let late = extract_until(Lang::Rust, &text, thread_time());
    assert!(late.unread.is_some() && late.defs.is_empty());
    assert_eq!(extract(Lang::Rust, &text).defs.len(), SYMBOLS_MAX);
}

#[test]
fn deep_nesting_does_no_harm() {
    for lang in ALL {
        for text in [
            "(".repeat(20_000),
            "{[".repeat(10_000),
            "<a id=\"b\">".repeat(5_000),
            "- ".repeat(5_000),
            "> ".repeat(2_000),
        ] {
            // Whether it ends by itself or by the deadline, it ends.
            extract_until(lang, &text, thread_time() + Duration::from_millis(15));
        }
    }
}

#[test]
fn nesting_that_would_end_the_process_is_not_parsed() {
    let seq = "- ".repeat(300) + "x";
    let stairs: String = (0..300).map(|n| format!("{}a:\n", " ".repeat(n))).collect();
    let ifs: String = (0..600).map(|n| format!("{}if x:\n", " ".repeat(n))).collect();
    for (lang, text) in [(Lang::Yaml, &seq), (Lang::Yaml, &stairs), (Lang::Python, &ifs)] {
        assert!(extract(lang, text).unread.is_some(), "{lang:?}");
    }
    // What is let through is read: the deepest there is.
    let stairs: String = (0..100).map(|n| format!("{}a:\n", " ".repeat(n))).collect();
    let seq = "- ".repeat(YAML_MARKS_MAX) + "x";
    let ifs: String = (0..INDENT_MAX).map(|n| format!("{}if x:\n", " ".repeat(n))).collect();
    for (lang, text) in [(Lang::Yaml, &seq), (Lang::Yaml, &stairs), (Lang::Python, &ifs)] {
        assert!(extract(lang, text).unread.is_none(), "{lang:?}");
    }
}

#[test]
fn uses_are_names_of_some_length() {
    assert_eq!(uses("let total = total + abc + 12345;"), [mark("total")]);
    assert_eq!(mark(""), 0x811c_9dc5);
    assert_eq!(mark("a"), 0xe40c_292c);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn garbage_does_no_harm(text in "(\\PC|[\\n{}()<>:;#\"'`= ]|fn |class |def |func |int |\\$x|ü){0,120}") {
        let lines = u32::try_from(text.lines().count().max(1)).unwrap();
        for lang in ALL {
            for (ord, def) in extract(lang, &text).defs.iter().enumerate() {
                prop_assert!(def.start >= 1 && def.start <= def.end && def.head_end >= def.start, "{lang:?} {def:?}");
                prop_assert!(def.end <= lines + 1, "{lang:?} {def:?}");
                prop_assert!(def.outer.is_none_or(|outer| (outer as usize) < ord));
            }
        }
    }
}
