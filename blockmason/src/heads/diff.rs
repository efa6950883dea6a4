//! Two layouts side by side, as a diff is read.

use super::file::Way;
use std::collections::BTreeSet;

/// What an empty way is called.
const AS_IT_IS: &str = "served as it is";

/// Lines of a diff that are shown.
const MOST: usize = 40;

/// `-` before what only the head says, `+` before what only the graph says. Ways that both have are left
/// out.
pub(super) fn diff(head: &BTreeSet<Way>, graph: &BTreeSet<Way>) -> Vec<String> {
    let lines = |ways: BTreeSet<&Way>| -> Vec<String> {
        let shown = |way: &&Way| if way.is_empty() { vec![AS_IT_IS.to_owned()] } else { way.to_vec() };
        ways.iter().flat_map(shown).collect()
    };
    let (was, is) = (lines(head.difference(graph).collect()), lines(graph.difference(head).collect()));
    let mut lines = merge(&was, &is);
    if lines.len() > MOST {
        let left = lines.len() - MOST;
        lines.truncate(MOST);
        lines.push(format!("  ... and {left} more lines"));
    }
    lines
}

/// The shortest way from one list to the other.
fn merge(was: &[String], is: &[String]) -> Vec<String> {
    // common[i][j]: how many lines was[i..] and is[j..] share in order.
    let mut common = vec![vec![0u32; is.len() + 1]; was.len() + 1];
    for i in (0..was.len()).rev() {
        for j in (0..is.len()).rev() {
            common[i][j] = match was[i] == is[j] {
                true => common[i + 1][j + 1] + 1,
                false => common[i + 1][j].max(common[i][j + 1]),
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut lines = Vec::new();
    while i < was.len() || j < is.len() {
        if i < was.len() && j < is.len() && was[i] == is[j] {
            lines.push(format!("  {}", was[i]));
            (i, j) = (i + 1, j + 1);
        } else if j == is.len() || i < was.len() && common[i + 1][j] >= common[i][j + 1] {
            lines.push(format!("- {}", was[i]));
            i += 1;
        } else {
            lines.push(format!("+ {}", is[j]));
            j += 1;
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ways(text: &[&[&str]]) -> BTreeSet<Way> {
        text.iter().map(|way| way.iter().map(|line| (*line).to_owned()).collect()).collect()
    }

    #[test]
    fn reads_like_a_diff() {
        let (was, is) = (ways(&[&["slice", "stripe 1", "  x"]]), ways(&[&["slice", "stripe 2", "  x"]]));
        assert_eq!(diff(&was, &is), ["  slice", "- stripe 1", "+ stripe 2", "    x"]);
        assert_eq!(diff(&was, &ways(&[&[]])), ["- slice", "- stripe 1", "-   x", "+ served as it is"]);
        assert_eq!(diff(&ways(&[&["a"], &["b"]]), &ways(&[&["a"], &["c"]])), ["- b", "+ c"]);
        let long: Vec<String> = (0..100).map(|n| n.to_string()).collect();
        assert_eq!(diff(&BTreeSet::from([long]), &BTreeSet::new()).len(), MOST + 1);
    }
}
