// Runs the image tower of `qwt-fx export --format aoti` without Python.
// usage: embed IMAGE_TOWER.pt2 HEIGHT WIDTH
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <iostream>
#include <string>
#include <vector>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: embed IMAGE_TOWER.pt2 HEIGHT WIDTH\n";
    return 2;
  }
  c10::InferenceMode no_grad;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  // Preprocessed as preprocess.json says: (n, 3, h, w) float32.
  at::Tensor images = torch::rand({4, 3, std::stol(argv[2]), std::stol(argv[3])});
  std::vector<at::Tensor> features = loader.run({images});  // one tensor (n, d), not normalized
  std::cout << features[0].sizes() << '\n';
  return 0;
}
