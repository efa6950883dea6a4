#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| blockmason_tests::fuzz::parallax_pool(data));
