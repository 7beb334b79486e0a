//! What became of the folder before, or becomes of it meanwhile, does not show.

use super::*;
use proptest::prelude::*;

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
    /// A folder in place of a file, or the other way round.
    Folder(usize, usize),
    Ignore(usize),
    Update,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..12, 0usize..40).prop_map(|(file, text)| Step::Write(file, text)),
        2 => (0usize..12).prop_map(Step::Delete),
        2 => (0usize..12, 0usize..12).prop_map(|(from, to)| Step::Rename(from, to)),
        1 => (0usize..12).prop_map(Step::Binary),
        1 => (0usize..12, 0usize..40).prop_map(|(file, text)| Step::Folder(file, text)),
        1 => (0usize..12).prop_map(Step::Ignore),
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
                Step::Write(file, number) => {
                    drop(fs::remove_dir_all(at(file)));
                    write(root.path(), &name(file), text(number));
                }
                Step::Delete(file) => drop(fs::remove_file(at(file))),
                Step::Folder(file, number) => {
                    drop(fs::remove_file(at(file)));
                    write(root.path(), &format!("{}/inner.rs", name(file)), text(number));
                }
                Step::Ignore(file) => write(root.path(), ".gitignore", format!("{}\n", name(file))),
                Step::Rename(from, to) => {
                    fs::create_dir_all(at(to).parent().unwrap()).unwrap();
                    drop(fs::rename(at(from), at(to)));
                }
                Step::Binary(file) => {
                    drop(fs::remove_dir_all(at(file)));
                    write(root.path(), &name(file), b"a\0b");
                }
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
    type Harm = (&'static str, fn(&Path));
    let harms: [Harm; 4] = [
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
    for number in 0..24 {
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
