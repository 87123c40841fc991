// What calls gave on one machine, in a file, for another machine to compare with.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

class Results {
 public:
  Results(const std::string& path, bool writes)
      : path_(path), writes_(writes), file_(std::fopen(path.c_str(), writes ? "wb" : "rb")) {
    if (file_ == nullptr) stop();
  }
  Results(const Results&) = delete;
  Results& operator=(const Results&) = delete;

  // Writes these bytes, or replaces them by those that stand in their place, so that both machines
  // take one path: whoever writes compares its results with themselves.
  void exchange(void* data, uint64_t bytes) {
    const auto done =
        writes_ ? std::fwrite(data, 1, bytes, file_) : std::fread(data, 1, bytes, file_);
    if (done != bytes) stop();
  }
  std::string exchange(std::string text) {
    uint64_t size = text.size();
    exchange(&size, sizeof(size));
    if (!writes_ && size > 1 << 20) stop();  // of another call
    text.resize(size);
    exchange(text.data(), size);
    return text;
  }
  void finish() {
    if (!writes_ && std::fgetc(file_) != EOF) stop();
    if (std::fclose(file_) != 0) stop();
  }

 private:
  [[noreturn]] void stop() const {
    std::fprintf(stderr, "driver: expected a file %s, got %s; %s\n",
                 writes_ ? "that takes the results" : "with the results of these calls",
                 path_.c_str(), writes_ ? "make room" : "write it with the same options");
    std::exit(2);
  }

  const std::string path_;
  const bool writes_;
  std::FILE* const file_;
};
