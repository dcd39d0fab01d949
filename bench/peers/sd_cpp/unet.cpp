// Forwards of a UNet by stable-diffusion.cpp on Vulkan, for sd_cpp.py. All tensors are f32 and contiguous.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "ggml-vulkan.h"
#include "model.h"
#include "unet.hpp"

namespace {

constexpr auto PREFIX = "model.diffusion_model";

struct FreeBackend {
  void operator()(ggml_backend* backend) const { ggml_backend_free(backend); }
};

struct Model {
  std::unique_ptr<ggml_backend, FreeBackend> backend;
  // After the backend, so that it goes first.
  std::unique_ptr<UNetModelRunner> unet;
};

// Software drivers emulate arithmetic in f16. Read when a device is opened.
void computeInF32OnSoftware() {
  char description[256] = "";
  ggml_backend_vk_get_device_description(0, description, sizeof description);
  if (std::strstr(description, "llvmpipe")) setenv("GGML_VK_DISABLE_F16", "1", 1);
}

// Fastest axis first, as the library has it.
sd::Tensor<float> tensor(const float* values, std::vector<int64_t> shape) {
  sd::Tensor<float> copy(shape);
  std::memcpy(copy.data(), values, copy.values().size() * sizeof(float));
  return copy;
}

}  // namespace

extern "C" {

// A checkpoint whose keys have no prefix; nullptr where it cannot be loaded.
Model* unet_open(const char* path, bool is_sdxl) {
  ModelLoader loader;
  if (!loader.init_from_file_and_convert_name(path, std::string(PREFIX) + ".")) return nullptr;
  if (ggml_backend_vk_get_device_count() == 0) return nullptr;
  computeInF32OnSoftware();
  auto model = std::make_unique<Model>();
  model->backend.reset(ggml_backend_vk_init(0));
  if (!model->backend) return nullptr;
  model->unet = std::make_unique<UNetModelRunner>(model->backend.get(), false, loader.get_tensor_storage_map(), PREFIX,
                                                  is_sdxl ? VERSION_SDXL : VERSION_SD1);
  model->unet->alloc_params_buffer();
  std::map<std::string, ggml_tensor*> tensors;
  model->unet->get_param_tensors(tensors, PREFIX);
  return loader.load_tensors(tensors) ? model.release() : nullptr;
}

// x, out [images, channels, size, size]; timesteps [images]; context [images, tokens, width]; y [images, adm] or nullptr.
bool unet_run(Model* model, int64_t images, int64_t channels, int64_t size, int64_t tokens, int64_t width, int64_t adm,
              const float* x, const float* timesteps, const float* context, const float* y, float* out) {
  auto result = model->unet->compute(1, tensor(x, {size, size, channels, images}), tensor(timesteps, {images}),
                                     tensor(context, {width, tokens, images}), {},
                                     y ? tensor(y, {adm, images}) : sd::Tensor<float>());
  if (result.empty()) return false;
  std::memcpy(out, result.data(), result.values().size() * sizeof(float));
  return true;
}

void unet_close(Model* model) { delete model; }
}
