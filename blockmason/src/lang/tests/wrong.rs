//! Wrong graphs, and what is said of them. Each snapshot holds the graph and its errors.

use super::*;

/// Defines one test for each graph: a name, the text, and perhaps files that it includes.
macro_rules! wrong {
    ($($name:ident: $text:literal $(, $path:literal: $file:literal)*;)*) => {$(
        #[test]
        fn $name() {
            let files = Memory(&[$(($path, $file)),*]);
            let shown = errors_with(&files, $text, &Defines::new());
            assert_ne!(shown, "fine");
            let text = $text.trim_end().replace('\u{1b}', "ESC");
            insta::assert_snapshot!(stringify!($name), format!("{text}\n\n{shown}"));
        }
    )*};
}

wrong! {
    // Syntax.
    word_instead_of_statement: "elment A (type null)\n";
    stray_brace: "}\n";
    missing_name: "element (type null)\n";
    digit_in_front: "element 9A (type null)\n";
    unclosed_parenthesis: "element A (type null\nelement B (type null)\n";
    unclosed_at_the_end: "element A (type file) (path disk.img";
    comma_between_values: "element A (type filter) (keep read, write)\n";
    equals_sign_in_parameter: "element A (type=null)\n";
    endless_string: "element A (type file) (path \"disk.img)\nelement B (typo null)\n";
    unknown_escape: "element A (type file) (path \"C:\\disk.img\")\n";
    edge_without_lower_end: "element A (type null)\nA ->\n";
    edge_without_upper_end: "element A (type null)\n(A out) -> B\n";
    edge_without_comma: "(A out) -> (B, in)\n";
    edge_with_a_fat_arrow: "A => B\n";
    param_without_value: "param size =\n";
    open_reference: "param a = ${b\n";
    strange_reference: "param a = ${1+1}\n";
    include_of_a_word: "include lib.mason\n";
    include_with_parameter: "include \"${x}.mason\"\n";
    compound_not_closed: "compound C () {\n    element A (type null)\n";
    port_outside_of_a_compound: "port in = (A, in)\n";
    port_without_inner_port: "compound C () {\n    element A (type null)\n    port in = A\n}\n";
    invariant_without_a_sentence: "invariant : no path A -> B\n";
    invariant_with_an_empty_sentence: "invariant \" \": no path A -> B\n";
    invariant_without_a_colon: "invariant \"writes are logged\" every path A -> B passes debug_log\n";
    invariant_without_every: "invariant \"writes are logged\": all paths A -> B pass debug_log\n";
    invariant_without_path: "invariant \"writes are logged\": every write paths A -> B passes debug_log\n";
    invariant_without_passes: "invariant \"writes are logged\": every write path A -> B pass debug_log\n";
    invariant_without_an_end: "invariant \"writes are logged\": no path A passes debug_log\n";
    invariant_of_any: "invariant \"writes are logged\": every path any -> B passes debug_log\n";
    several_at_once: "element A (type null\nelement B () (type null)\nparam = 5\nelement C (type \"null)\n";
    control_characters: "element \u{1b}[31mA (type null)\n";
    letters_beyond_ascii: "element Größe (type null)\n";

    // Parameters of the graph.
    undefined_parameter: "param image = disk.img\nelement A (type file) (path ${imgae})\n";
    undefined_parameter_without_a_likeness: "element A (type file) (path ${disk})\n";
    parameter_set_twice: "param a = 1\nparam a = 2\n";
    parameter_of_itself: "param a = ${b}\nparam b = x${c}\nparam c = ${a}\n";
    parameter_with_a_bad_value: "param size = 4x\nelement G (type nbd) (listen unix:/s)\nelement D (type file) (path d) (size ${size})\nG -> D\n";

    // Includes.
    include_not_found: "include \"lib/missing.mason\"\n";
    include_of_itself: "include \"lib/a.mason\"\n", "/srv/lib/a.mason": "include \"../vm.mason\"\n";
    error_in_an_included_file: "include \"lib/a.mason\"\nelement G (type nbd) (listen unix:/s)\nG -> D\n",
        "/srv/lib/a.mason": "# The disk.\nelement D (type fil) (path disk.img)\n";
    doubled_across_files: "include \"lib/a.mason\"\nelement D (type null)\n",
        "/srv/lib/a.mason": "element D (type null)\n";

    // Compounds.
    compound_parameter_unknown: "compound C (size) {\n    element A (type null)\n}\nelement X (type C) (sise 4k) (size 1)\n";
    compound_parameter_missing: "compound C (size) {\n    element A (type null)\n}\nelement X (type C)\n";
    compound_port_unknown: "compound C () {\n    element A (type null)\n    port in = (A, in)\n}\nelement X (type C)\nelement G (type nbd) (listen unix:/s)\n(G, out) -> (X, inn)\n";
    compound_port_to_nothing: "compound C () {\n    element A (type null)\n    port in = (B, in)\n}\nelement X (type C)\n";
    compound_of_itself: "compound C () {\n    element A (type C)\n}\nelement X (type C)\n";
    compound_defined_twice: "compound C () { }\ncompound C () { }\n";
    error_inside_a_compound: "compound C () {\n    element A (type file) (pth x)\n    port in = (A, in)\n}\nelement X (type C)\nelement G (type nbd) (listen unix:/s)\nG -> X\n";
    list_in_the_middle_of_a_word: "compound C (ops) {\n    element A (type file) (path x${ops})\n}\nelement X (type C) (ops a b)\n";

    // Invariants.
    invariant_broken: "element Guest (type nbd) (listen unix:/s)\nelement Cache (type throttle) (rate 5M/s)\nelement Bucket (type file) (path b)\nGuest -> Cache -> Bucket\n\ninvariant \"writes are logged\":\n    every write path Guest -> file passes debug_log or any if\n";
    invariant_broken_on_one_of_two_ways: "invariant \"all is logged\": every path export -> sink passes Log\nelement G (type nbd) (listen unix:/s)\nelement F (type filter)\nelement Log (type debug_log)\nelement D (type file) (path d)\nG -> F\n(F, yes) -> Log -> D\n(F, no) -> D\n";
    invariant_of_no_path: "element G (type nbd) (listen unix:/s)\nelement H (type nbd) (listen unix:/t)\nelement A (type null)\nelement B (type null)\nelement T (type tee)\nG -> A\nH -> T\n(T, a) -> A\n(T, b) -> B\ninvariant \"guests are apart\": no path H -> A\n";
    invariant_of_what_no_path_passes: "element G (type nbd) (listen unix:/s)\nelement T (type throttle) (rate 1k/s)\nelement D (type null)\nG -> T -> D\ninvariant \"nothing is slow\": no read path export -> sink passes throttle\n";
    invariant_about_nothing: "element G (type nbd) (listen unix:/s)\nelement D (type null)\nG -> D\ninvariant \"files are logged\": every path G -> file passes debug_log\n";
    invariant_with_unknown_names: "element Guest (type nbd) (listen unix:/s)\nelement Disk (type null)\nGuest -> Disk\ninvariant \"x\": every path Gest -> snik passes debuglog or quantum\n";
    invariant_with_two_meanings: "element file (type nbd) (listen unix:/s)\nelement D (type file) (path d)\nfile -> D\ninvariant \"x\": every path file -> D passes D\n";
    invariant_about_a_compound: "compound C () {\n    element A (type null)\n    port in = (A, in)\n}\nelement X (type C)\nelement G (type nbd) (listen unix:/s)\nG -> X\ninvariant \"x\": no path G -> X\n";
    invariant_in_a_compound: "compound C () {\n    element A (type null)\n    port in = (A, in)\n    invariant \"A is logged\": every path export -> A passes debug_log\n}\nelement X (type C)\nelement G (type nbd) (listen unix:/s)\nelement L (type debug_log)\nelement Y (type C)\nG -> L -> X\nelement H (type nbd) (listen unix:/s)\nH -> Y\n";
    invariant_in_an_included_file: "include \"lib/safe.mason\"\nelement G (type nbd) (listen unix:/s)\nelement D (type null)\nG -> D\n",
        "/srv/lib/safe.mason": "invariant \"nothing is lost\": no write path export -> null\n";

    // Names and types.
    element_twice: "element A (type null)\nelement A (type file) (path x)\n";
    no_type: "element A (path disk.img)\n";
    two_types: "element A (type null) (type file)\n";
    type_with_two_values: "element A (type null file)\n";
    unknown_type: "element G (type nbd) (listen unix:/s)\nelement D (type fiel) (path x)\nG -> D\n";
    unknown_type_without_a_likeness: "element G (type nbd) (listen unix:/s)\nelement D (type quantum)\nG -> D\n";
    unknown_element_in_an_edge: "element Guest (type nbd) (listen unix:/s)\nelement Disk (type null)\nGuest -> Dsik\n";

    // Parameters of elements.
    unknown_parameter: "element G (type nbd) (listen unix:/s)\nelement D (type file) (path x) (drect yes)\nG -> D\n";
    unknown_parameter_without_a_likeness: "element G (type nbd) (listen unix:/s)\nelement D (type file) (path x) (colour red)\nG -> D\n";
    missing_parameter: "element G (type nbd) (listen unix:/s)\nelement D (type file)\nG -> D\n";
    parameter_twice: "element G (type nbd) (listen unix:/s)\nelement D (type file) (path x) (path y)\nG -> D\n";
    wrong_boolean: "element G (type nbd) (listen unix:/s)\nelement D (type file) (path x) (direct on)\nG -> D\n";
    wrong_size: "element G (type nbd) (listen unix:/s)\nelement D (type file) (path x) (size 10MB)\nG -> D\n";
    negative_size: "element G (type nbd) (listen unix:/s)\nelement D (type file) (path x) (size -1)\nG -> D\n";
    absurd_size: "element G (type nbd) (listen unix:/s)\nelement D (type file) (path x) (size 9999999999T)\nG -> D\n";
    wrong_word: "element G (type nbd) (listen unix:/s)\nelement F (type filter) (keep read wriet)\nelement D (type null)\nG -> F\n(F, yes) -> D\n(F, no) -> D\n";
    two_values_for_one: "element G (type nbd) (listen unix:/s)\nelement D (type file) (path my disk.img)\nG -> D\n";
    no_value: "element G (type nbd) (listen unix:/s)\nelement D (type file) (path)\nG -> D\n";
    wrong_values_of_many_kinds: "element G (type nbd) (listen /run/vm.sock)\nelement T (type throttle) (rate 50M) (ops 10k/s) (patience 10) (depth 65536)\nelement D (type null)\nG -> T -> D\n";
    wrong_ranges: "element G (type nbd) (listen unix:/s)\nelement F (type filter) (range 4k 8k-4k) (chance 110%)\nelement D (type null)\nG -> F\n(F, yes) -> D\n(F, no) -> D\n";

    // Edges.
    unknown_out_port: "element G (type nbd) (listen unix:/s)\nelement F (type filter)\nelement D (type null)\nG -> F\n(F, yse) -> D\n(F, no) -> D\n";
    unknown_in_port: "element G (type nbd) (listen unix:/s)\nelement D (type null)\n(G, out) -> (D, input)\n";
    unconnected_port: "element G (type nbd) (listen unix:/s)\nelement L (type debug_log)\nG -> L\n";
    two_edges_from_one_port: "element G (type nbd) (listen unix:/s)\nelement A (type null)\nelement B (type null)\nG -> A\nG -> B\n";
    variadic_without_a_name: "element G (type nbd) (listen unix:/s)\nelement T (type tee)\nelement D (type null)\nG -> T -> D\n";
    variadic_with_too_few: "element G (type nbd) (listen unix:/s)\nelement S (type stripe)\nelement D (type null)\nG -> S\n(S, a) -> D\n";
    variadic_name_twice: "element G (type nbd) (listen unix:/s)\nelement S (type stripe)\nelement D (type null)\nG -> S\n(S, a) -> D\n(S, a) -> D\n";
    edge_out_of_a_sink: "element G (type nbd) (listen unix:/s)\nelement D (type null)\nelement E (type null)\nG -> D -> E\n";
    edge_into_an_export: "element G (type nbd) (listen unix:/s)\nelement H (type nbd) (listen unix:/t)\nelement D (type null)\nG -> H\nH -> D\n";
    circle: "element G (type nbd) (listen unix:/s)\nelement A (type filter)\nelement B (type debug_log)\nelement D (type null)\nG -> A\n(A, yes) -> B -> A\n(A, no) -> D\n";
    circle_of_one: "element G (type nbd) (listen unix:/s)\nelement A (type debug_log)\nG -> A -> A\n";
    nothing_reaches_it: "element G (type nbd) (listen unix:/s)\nelement D (type null)\nelement E (type null)\nG -> D\n";
    no_export: "element A (type debug_log)\nelement D (type null)\nA -> D\n";
    empty: "# Nothing yet.\n";

    // Element references.
    reference_to_nothing: "element G (type nbd) (listen unix:/s)\nelement I (type if) (test Dirt)\nelement Dirty (type log_dirty)\nelement D (type null)\nG -> Dirty -> I\n(I, yes) -> D\n(I, no) -> D\n";
    reference_to_the_wrong_type: "element G (type nbd) (listen unix:/s)\nelement I (type if) (test D)\nelement D (type null)\nG -> I\n(I, yes) -> D\n(I, no) -> D\n";
    references_in_a_circle: "element G (type nbd) (listen unix:/s)\nelement I (type if) (test J)\nelement J (type if) (test I)\nelement D (type null)\nG -> I\n(I, yes) -> J\n(I, no) -> D\n(J, yes) -> D\n(J, no) -> D\n";
}

#[test]
fn a_value_of_the_command_line_is_shown() {
    let mut defines = Defines::new();
    defines.set_from("size=10MB", "/home/me").unwrap();
    let text =
        "element G (type nbd) (listen unix:/s)\nelement D (type file) (path d) (size ${size})\nG -> D\n";
    insta::assert_snapshot!("a_value_of_the_command_line", errors_with(&NoFiles, text, &defines));
}

#[test]
fn the_drawing_for_a_terminal() {
    let errors = parse("element G (type nbd) (listen unix:/s)\nelement G (type null)\n").unwrap_err();
    insta::assert_snapshot!(
        "drawing_for_a_terminal",
        errors.render(Style::Fancy, 80).replace('\u{1b}', "ESC")
    );
}

#[test]
fn errors_as_json() {
    let errors =
        parse("param größe = 1\nelement A (type null)\nelement A (type file)\nA -> B\n").unwrap_err();
    insta::assert_snapshot!("json_syntax", format!("{:#}", errors.to_json()));
    let errors =
        parse("element A (type null)\n\nelement A (type file)\nA -> Bb\nelement B (type null)").unwrap_err();
    insta::assert_snapshot!("json", format!("{:#}", errors.to_json()));
}

#[test]
fn the_first_error_in_one_line() {
    let spec = parse("element G (type nbd) (listen unix:/s)\nelement D (type fiel)\nG -> D").unwrap();
    let errors = check(&spec, CATALOGUE).unwrap_err();
    let line = "vm.mason:2:17: element `D`: there is no type `fiel` (did you mean `file`?)";
    assert_eq!(errors.first_line(), line);
    assert_eq!(errors.count(), 1);
}

#[test]
fn a_file_that_cannot_be_read() {
    let errors = load("/nonexistent/vm.mason".as_ref(), &Defines::new()).unwrap_err();
    let line = "/nonexistent/vm.mason:1:1: cannot read `/nonexistent/vm.mason`: there is no such file";
    assert_eq!(errors.first_line(), line);
}
